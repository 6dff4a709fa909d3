#ifdef __x86_64__
#ifndef __AVX512F__
#error "compile with -mavx512f: see setup.py"
#endif
#include "columns.h"

const Variant hsd_avx512 = {statistics_row, gradient_row, norms_of_block, elementary};
#endif

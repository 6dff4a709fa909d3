#ifdef __x86_64__
#if !defined(__AVX2__) || !defined(__FMA__) || defined(__AVX512F__)
#error "compile with -mavx2 -mfma alone: see setup.py"
#endif
#include "columns.h"

const Variant hsd_avx2 = {statistics_row, gradient_row, norms_of_block, elementary};
#endif

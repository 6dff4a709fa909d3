#include "columns.h"

const Variant hsd_baseline = {statistics_row, gradient_row, norms_of_block, elementary};

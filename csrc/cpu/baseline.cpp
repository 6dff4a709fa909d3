#include "rows.h"

const Variant hsd_baseline = {statistics_row, gradient_row, elementary};

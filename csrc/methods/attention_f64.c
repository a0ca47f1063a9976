/* Attention in float64. */
#define FP_REAL_DOUBLE 1

#include "attention_run.h"
#include "nodes_state_real.h"

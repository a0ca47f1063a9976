/* Attention in float32. */
#define FP_REAL_DOUBLE 0

#include "attention_run.h"
#include "nodes_state_real.h"

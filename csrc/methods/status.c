#include "foldprune.h"

const char *fp_status_text(fp_status status)
{
    switch (status) {
    case FP_OK:
        return "no error";
    case FP_ERR_ARGUMENT:
        return "invalid argument";
    case FP_ERR_DTYPE:
        return "unsupported element type (float32, float64, float16 and bfloat16 are supported)";
    case FP_ERR_SHAPE:
        return "sizes disagree";
    case FP_ERR_RANGE:
        return "a rank, count or index is out of range";
    case FP_ERR_CORRUPT:
        return "packed data contradicts its mask or sizes";
    case FP_ERR_LAPACK:
        return "LAPACK did not converge";
    case FP_ERR_OVERFLOW:
        return "a size is too large";
    case FP_ERR_VALUE:
        return "a number is NaN, infinite or too large, or a weight is negative";
    }
    return "unknown status";
}

size_t fp_dtype_size(fp_dtype dtype)
{
    switch (dtype) {
    case FP_F32:
        return 4;
    case FP_F64:
        return 8;
    case FP_F16:
    case FP_BF16:
        return 2;
    case FP_I8:
        return 0;
    }
    return 0;
}

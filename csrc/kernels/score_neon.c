/* Scores and masks, 64 elements at a time. */
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "pack_loop.h"
#include "score_loop.h"

static inline void widen(const uint16_t *x, float *y)
{
    vst1q_f32(y, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))));
    vst1q_f32(y + 4, vcvt_high_f32_f16(vreinterpretq_f16_u16(vld1q_u16(x))));
}

static inline uint32x4_t load_and(const float *s, uint32_t bits)
{
    return vandq_u32(vreinterpretq_u32_f32(vld1q_f32(s)), vdupq_n_u32(bits));
}

/* 4 x 4 lanes, each 0 or all ones, to 16 bytes. */
static inline uint8x16_t narrow(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d)
{
    uint16x8_t ab = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
    uint16x8_t cd = vuzp1q_u16(vreinterpretq_u16_u32(c), vreinterpretq_u16_u32(d));
    return vuzp1q_u8(vreinterpretq_u8_u16(ab), vreinterpretq_u8_u16(cd));
}

/* 64 such bytes to bits: each keeps its own bit, and neighbours add up. */
static inline uint64_t gather_bits(const uint8x16_t bytes[4])
{
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(UINT64_C(0x8040201008040201)));
    uint8x16_t lower = vpaddq_u8(vandq_u8(bytes[0], bit), vandq_u8(bytes[1], bit));
    uint8x16_t upper = vpaddq_u8(vandq_u8(bytes[2], bit), vandq_u8(bytes[3], bit));
    uint8x16_t sum = vpaddq_u8(lower, upper);
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(sum, sum)), 0);
}

static inline size_t compare(const float *s, uint32_t limit, uint64_t *above)
{
    uint32x4_t t = vdupq_n_u32(limit);
    uint8x16_t bytes[4], ties = vdupq_n_u8(0);
    FP_UNROLL
    for (unsigned j = 0; j < 4; j++, s += 16) {
        uint32x4_t a = load_and(s, 0x7fffffffu), b = load_and(s + 4, 0x7fffffffu);
        uint32x4_t c = load_and(s + 8, 0x7fffffffu), d = load_and(s + 12, 0x7fffffffu);
        bytes[j] = narrow(vcgtq_u32(a, t), vcgtq_u32(b, t), vcgtq_u32(c, t), vcgtq_u32(d, t));
        ties = vsubq_u8(ties,
                        narrow(vceqq_u32(a, t), vceqq_u32(b, t), vceqq_u32(c, t), vceqq_u32(d, t)));
    }
    *above = gather_bits(bytes);
    return vaddvq_u8(ties);
}

static inline uint64_t matches(const float *s, uint32_t high)
{
    uint32x4_t h = vdupq_n_u32(high << 16);
    uint8x16_t bytes[4];
    FP_UNROLL
    for (unsigned j = 0; j < 4; j++, s += 16)
        bytes[j] = narrow(vceqq_u32(load_and(s, 0x7fff0000u), h),
                          vceqq_u32(load_and(s + 4, 0x7fff0000u), h),
                          vceqq_u32(load_and(s + 8, 0x7fff0000u), h),
                          vceqq_u32(load_and(s + 12, 0x7fff0000u), h));
    return gather_bits(bytes);
}

FP_DEFINE_SCORE_LOOPS(neon, 8, 64)
FP_DEFINE_KERNELS(neon, neon);
#endif

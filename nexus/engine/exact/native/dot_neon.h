/* dot_rows for ARM: sdot where the processor has it, else widening multiplications. Both want both operands signed, so weights lose
 * their 128 as they are loaded and the correction of the caller is given back here: sum(x * w) = sum(x * (w + 128)) - 128 * sum(x).
 */
#include <arm_neon.h>

#define DOT_ROWS 2

/* 16 columns by products of 16 bits: each register holds two columns, the halves of a quad side by side. */
ALWAYS_INLINE void dot_widened(const int sign, const int is_ahead, const int8_t *x, const uint8_t *w, int quads, int32_t *acc) {
    int32x4_t a[8];
    for (int i = 0; i < 8; i++)
        a[i] = vdupq_n_s32(0);
    for (int k = 0; k < quads; k++, w += 64) {
        fetch(is_ahead, w);
        const int8x8_t quad = vreinterpret_s8_s32(vdup_n_s32(quad_at(x + 4 * k)));
        const int16x8_t b = sign == SIGNED_X ? vmovl_s8(quad) : vreinterpretq_s16_u16(vmovl_u8(vreinterpret_u8_s8(quad)));
        for (int i = 0; i < 8; i++) {
            const uint8x8_t bytes = vld1_u8(w + 8 * i);
            const int16x8_t v = sign == SIGNED_X ? vreinterpretq_s16_u16(vmovl_u8(bytes)) : vmovl_s8(vreinterpret_s8_u8(bytes));
            a[i] = vaddq_s32(a[i], vpaddq_s32(vmull_s16(vget_low_s16(v), vget_low_s16(b)), vmull_high_s16(v, b)));
        }
    }
    for (int i = 0; i < 4; i++)
        vst1q_s32(acc + 4 * i, vaddq_s32(vld1q_s32(acc + 4 * i), vpaddq_s32(a[2 * i], a[2 * i + 1])));
}

#ifdef __ARM_FEATURE_DOTPROD
ALWAYS_INLINE void dot_signed(const int is_ahead, const int rows, const int8_t *x, size_t x_row, const uint8_t *w, size_t second,
                              int quads, int32_t *acc) {
    int32x4_t a[DOT_ROWS][8], sum[DOT_ROWS];
    for (int r = 0; r < rows; r++) {
        sum[r] = vdupq_n_s32(0);
        for (int i = 0; i < 8; i++)
            a[r][i] = vld1q_s32(acc + r * NX_BLOCK + 4 * i);
    }
    for (int k = 0; k < quads; k++, w += 64) {
        fetch(is_ahead, w);
        fetch(is_ahead, w + second);
        int8x16_t b[DOT_ROWS];
        for (int r = 0; r < rows; r++) {
            b[r] = vreinterpretq_s8_s32(vdupq_n_s32(quad_at(x + r * x_row + 4 * k)));
            sum[r] = vdotq_s32(sum[r], b[r], vdupq_n_s8(1));
        }
        for (int i = 0; i < 8; i++) {
            const uint8_t *bytes = (i < 4 ? w : w + second) + 16 * (i % 4);
            const int8x16_t v = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(bytes), vdupq_n_u8(128)));
            for (int r = 0; r < rows; r++)
                a[r][i] = vdotq_s32(a[r][i], v, b[r]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 8; i++)
            vst1q_s32(acc + r * NX_BLOCK + 4 * i, vaddq_s32(a[r][i], vshlq_n_s32(sum[r], 7)));
}
#endif

ALWAYS_INLINE void dot_rows(const int sign, const int is_ahead, int rows, const int8_t *x, size_t x_row, const uint8_t *w,
                            size_t second, int quads, int32_t *acc) {
#ifdef __ARM_FEATURE_DOTPROD
    if (sign == SIGNED_X) {
        if (rows == 1)
            dot_signed(is_ahead, 1, x, x_row, w, second, quads, acc);
        else
            dot_signed(is_ahead, 2, x, x_row, w, second, quads, acc);
        return;
    }
#endif
    for (int r = 0; r < rows; r++)
        for (int group = 0; group < 2; group++)
            dot_widened(sign, is_ahead, x + r * x_row, w + group * second, quads, acc + r * NX_BLOCK + group * NX_GROUP);
}

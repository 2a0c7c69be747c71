/* Elementwise passes of a step on a CPU: one read and one write of memory each, rows independent of their neighbours.
 *
 * Called through ops/native.py, which says what each computes; compiled by base/kernels.py for the processor at hand,
 * with contraction off: fused multiply-adds are written where they are meant, so that the last elements of a row, which
 * a compiler treats apart, get the same bits. Numbers are contiguous floats. A NaN or an infinity stays in its own row.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SMALL 16384 /* numbers: below that, waking threads costs more than it brings */
#define LARGEST 127.0f
#define TINY 1e-30f /* scale of a row of zeros */

/* e^x for |x| < 87, clamped beyond: x = n ln 2 + f, e^f by Cephes' polynomial (expf.c); relative error 2e-7. */
static inline float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x; /* these comparisons let a NaN through */
    x = x > 87.0f ? 87.0f : x;
    float n = __builtin_rintf(x * 1.44269504088896341f);
    float f = __builtin_fmaf(n, -0.693359375f, x);
    f = __builtin_fmaf(n, 2.12194440e-4f, f);
    float p = 1.9875691500e-4f;
    p = __builtin_fmaf(p, f, 1.3981999507e-3f);
    p = __builtin_fmaf(p, f, 8.3334519073e-3f);
    p = __builtin_fmaf(p, f, 4.1665795894e-2f);
    p = __builtin_fmaf(p, f, 1.6666665459e-1f);
    p = __builtin_fmaf(p, f, 5.0000001201e-1f);
    p = __builtin_fmaf(p * f, f, f + 1.0f);
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

static inline float sigmoid(float x)
{
    return 1.0f / (1.0f + exponential(-x));
}

void swiglu(long count, const float *gate, const float *up, float *restrict y)
{
#pragma omp parallel for simd schedule(static) if (count > SMALL)
    for (long i = 0; i < count; i++)
        y[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

void swiglu_gradient(long count, const float *grad, const float *gate, const float *up,
                     float *restrict d_gate, float *restrict d_up)
{
#pragma omp parallel for simd schedule(static) if (count > SMALL)
    for (long i = 0; i < count; i++) {
        float s = sigmoid(gate[i]);
        d_gate[i] = grad[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
        d_up[i] = grad[i] * gate[i] * s;
    }
}

void rms_norm(long rows, long size, float eps, const float *x, const float *weight,
              float *restrict y, float *restrict inverse)
{
#pragma omp parallel for schedule(static) if (rows * size > SMALL)
    for (long row = 0; row < rows; row++) {
        const float *in = x + row * size;
        float *out = y + row * size, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < size; i++)
            sum = __builtin_fmaf(in[i], in[i], sum);
        float r = inverse[row] = 1.0f / sqrtf(sum / (float)size + eps);
#pragma omp simd
        for (long i = 0; i < size; i++)
            out[i] = weight[i] * (in[i] * r);
    }
}

void rms_norm_gradient(long rows, long size, const float *grad, const float *x, const float *weight,
                       const float *inverse, float *restrict dx)
{
#pragma omp parallel for schedule(static) if (rows * size > SMALL)
    for (long row = 0; row < rows; row++) {
        const float *in = x + row * size, *d = grad + row * size;
        float *out = dx + row * size, r = inverse[row], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < size; i++)
            sum = __builtin_fmaf(d[i] * weight[i], in[i], sum);
        float mean = sum * r * r / (float)size;
#pragma omp simd
        for (long i = 0; i < size; i++)
            out[i] = r * (d[i] * weight[i] - in[i] * mean);
    }
}

static inline __attribute__((always_inline)) float quantise_row(long size, const float *in, const float *factors,
                                                                int8_t *restrict out)
{
    float largest = 0.0f;
    uint32_t most = 0; /* of the numbers without sign, as integers: their order, with NaN above all */
#pragma omp simd reduction(max : most)
    for (long i = 0; i < size; i++) {
        float number = factors ? in[i] * factors[i] : in[i];
        uint32_t bits;
        memcpy(&bits, &number, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    memcpy(&largest, &most, 4);
    largest = largest < TINY ? TINY : largest;
    float by = LARGEST / largest;
#pragma omp simd
    for (long i = 0; i < size; i++) {
        float number = factors ? in[i] * factors[i] : in[i];
        out[i] = (int8_t)(int32_t)__builtin_rintf(number * by);
    }
    return largest / LARGEST;
}

/* factors: numbers of every column, or NULL for ones. */
void quantise_rows(long rows, long size, const float *x, const float *factors,
                   int8_t *restrict integers, float *restrict scales)
{
#pragma omp parallel for schedule(static) if (rows * size > SMALL)
    for (long row = 0; row < rows; row++) {
        const float *in = x + row * size;
        int8_t *out = integers + row * size;
        scales[row] = factors ? quantise_row(size, in, factors, out) : quantise_row(size, in, NULL, out);
    }
}

/* factors and bias: numbers of every column, or NULL for none. */
void scale_products(long rows, long size, const int32_t *products, const float *scales, const float *factors,
                    const float *bias, float *restrict y)
{
#pragma omp parallel for schedule(static) if (rows * size > SMALL)
    for (long row = 0; row < rows; row++) {
        const int32_t *in = products + row * size;
        float *out = y + row * size, by = scales[row];
#pragma omp simd
        for (long i = 0; i < size; i++) {
            float number = (float)in[i] * by;
            number = factors ? number * factors[i] : number;
            out[i] = bias ? number + bias[i] : number;
        }
    }
}

/* (rows, heads, size) numbers: x cos + rotate_half(x) sin, with cos and sin (rows, size); back: its transpose. */
void rotate(long rows, long heads, long size, long back, const float *x, const float *cos, const float *sin,
            float *restrict y)
{
    long half = size / 2;
#pragma omp parallel for schedule(static) if (rows * heads * size > SMALL)
    for (long row = 0; row < rows; row++) {
        const float *c = cos + row * size, *s = sin + row * size;
        for (long head = 0; head < heads; head++) {
            const float *in = x + (row * heads + head) * size;
            float *out = y + (row * heads + head) * size;
            if (back) {
#pragma omp simd
                for (long i = 0; i < half; i++) {
                    out[i] = in[i] * c[i] + in[i + half] * s[i + half];
                    out[i + half] = in[i + half] * c[i + half] - in[i] * s[i];
                }
            } else {
#pragma omp simd
                for (long i = 0; i < half; i++) {
                    out[i] = in[i] * c[i] - in[i + half] * s[i];
                    out[i + half] = in[i + half] * c[i + half] + in[i] * s[i + half];
                }
            }
        }
    }
}

/* Turn logits into weight * (softmax - floor), in place; a row's softmax is e^(logit - largest) / total. */
void softmax_gradient(long rows, long size, float floor, const float *weights, float *logits, float *restrict largest,
                      float *restrict totals)
{
#pragma omp parallel for schedule(static) if (rows * size > SMALL)
    for (long row = 0; row < rows; row++) {
        float *z = logits + row * size, most = z[0];
        double total = 0.0;
#pragma omp simd reduction(max : most)
        for (long i = 0; i < size; i++)
            most = z[i] > most ? z[i] : most;
        for (long start = 0; start < size; start += 1024) { /* sums of sums: of 100,000 terms none is lost */
            long end = start + 1024 < size ? start + 1024 : size;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (long i = start; i < end; i++)
                sum += z[i] = exponential(z[i] - most);
            total += sum;
        }
        largest[row] = most;
        totals[row] = (float)total;
        float by = weights[row] / (float)total, less = weights[row] * floor;
#pragma omp simd
        for (long i = 0; i < size; i++)
            z[i] = z[i] * by - less;
    }
}

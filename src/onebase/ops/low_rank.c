/* The routed low-rank update on a CPU: rows times the few rows of a pair, forward and backward, each in one pass over its rows.
 *
 * Called through ops/native.py; what is computed says ops/low_rank.py. Rows are taken in blocks that stay in a core's own
 * cache while everything that they are needed for is done. All sums are over vectors of 16 numbers, the last of a row
 * filled up with zeros, so that a row's bits do not depend on where it lies. Compiled with contraction on (a * b + c is one
 * operation), which gcc 12 needs to keep the sums in registers.
 */
#include <omp.h>
#include <stddef.h>
#include <string.h>

#define LANES 16
#define BLOCK 32   /* rows */
#define CHUNK 512  /* numbers of a row whose products are summed at a time: four rows and a pair of r = 16 fit 48 KiB */
#define TILE 64    /* columns: four vectors */
#define SMALL 64   /* rows: below that, waking threads costs more than it brings */

typedef float lanes __attribute__((vector_size(64)));
typedef float stored __attribute__((vector_size(64), aligned(4), may_alias));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int places __attribute__((vector_size(64)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

/* Sums of neighbouring stretches: of the halves of every stretch of a vector, a's and b's in turn. */
#define HALVE_16(a, b) \
    (PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) + \
     PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define HALVE_8(a, b) \
    (PICK(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) + \
     PICK(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
#define HALVE_4(a, b) \
    (PICK(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) + \
     PICK(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#define HALVE_2(a, b) \
    (PICK(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) + \
     PICK(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))

static inline __attribute__((always_inline)) lanes load(const float *from, long count)
{
    lanes numbers = {0};
    if (count >= LANES)
        return *(const stored *)from;
    memcpy(&numbers, from, (size_t)count * sizeof(float));
    return numbers;
}

static inline __attribute__((always_inline)) void store(float *to, lanes numbers, long count)
{
    if (count >= LANES)
        *(stored *)to = numbers;
    else
        memcpy(to, &numbers, (size_t)count * sizeof(float));
}

static inline __attribute__((always_inline)) long less(long a, long b)
{
    return a < b ? a : b;
}

/* Return the sums of 16 vectors. */
static inline __attribute__((always_inline)) lanes sums(lanes v[LANES])
{
    for (int i = 0; i < 8; i++)
        v[i] = HALVE_16(v[i], v[i + 8]);
    for (int i = 0; i < 4; i++)
        v[i] = HALVE_8(v[i], v[i + 4]);
    for (int i = 0; i < 2; i++)
        v[i] = HALVE_4(v[i], v[i + 2]);
    return HALVE_2(v[0], v[1]);
}

/* y[i][j] += scale x[i] . w[j] for up to four rows of each; a row that is not there is any other, and its sums are dropped. */
static inline void four_dots(long size, const float *x, long x_step, long rows, const float *w, long w_step, long few,
                             float scale, float *y, long y_step)
{
    const float *a[4], *b[4];
    for (int i = 0; i < 4; i++) {
        a[i] = x + (i < rows ? i : 0) * x_step;
        b[i] = w + (i < few ? i : 0) * w_step;
    }
    lanes s[LANES] = {0};
    long k = 0;
    for (; k + LANES <= size; k += LANES) {
        lanes right[4];
        for (int j = 0; j < 4; j++)
            right[j] = *(const stored *)(b[j] + k);
        for (int i = 0; i < 4; i++) {
            lanes left = *(const stored *)(a[i] + k);
            for (int j = 0; j < 4; j++)
                s[4 * i + j] += left * right[j];
        }
    }
    if (k < size)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++)
                s[4 * i + j] += load(a[i] + k, size - k) * load(b[j] + k, size - k);
    lanes found = sums(s);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < few; j++)
            y[i * y_step + j] += scale * found[4 * i + j];
}

/* y[i][j] = scale x[i] . w[j] for up to BLOCK rows of x and `few` of w, all with `size` numbers. */
static void dots(long rows, long size, long few, float scale, const float *x, const float *w, float *y, long y_step)
{
    for (long i = 0; i < rows; i++)
        memset(y + i * y_step, 0, (size_t)few * sizeof(float));
    for (long k = 0; k < size; k += CHUNK)
        for (long i = 0; i < rows; i += 4)
            for (long j = 0; j < few; j += 4)
                four_dots(less(CHUNK, size - k), x + i * size + k, size, less(4, rows - i), w + j * size + k, size,
                          less(4, few - j), scale, y + i * y_step + j, y_step);
}

/* y[i] (+)= scale sum over j of h[i][j] w[j], for four rows and four vectors of columns. */
static inline void four_mixes(long inner, float scale, const float *h, long h_row, long h_column, const float *w,
                              long step, float *y, int add)
{
    lanes s[4][4] = {0};
    for (long j = 0; j < inner; j++)
        for (int v = 0; v < 4; v++) {
            lanes right = *(const stored *)(w + j * step + v * LANES);
            for (int i = 0; i < 4; i++)
                s[i][v] += h[i * h_row + j * h_column] * right;
        }
    for (int i = 0; i < 4; i++)
        for (int v = 0; v < 4; v++) {
            stored *to = (stored *)(y + i * step + v * LANES);
            *to = add ? scale * s[i][v] + *to : scale * s[i][v];
        }
}

static inline void one_mix(long inner, float scale, const float *h, long h_column, const float *w, long step, float *y,
                           long count, int add)
{
    lanes s = {0};
    for (long j = 0; j < inner; j++)
        s += h[j * h_column] * load(w + j * step, count);
    store(y, add ? scale * s + load(y, count) : scale * s, count);
}

/* y[i] (+)= scale sum over j of h(i, j) w[j]; rows of w and y have `columns` numbers, h lies with the steps given. */
static void mixes(long rows, long inner, long columns, float scale, const float *h, long h_row, long h_column,
                  const float *w, float *y, int add)
{
    for (long c = 0; c < columns; c += TILE)
        for (long i = 0; i < rows; i += 4) {
            const float *left = h + i * h_row;
            float *to = y + i * columns + c;
            if (rows - i >= 4 && columns - c >= TILE) {
                four_mixes(inner, scale, left, h_row, h_column, w + c, columns, to, add);
                continue;
            }
            for (long row = 0; row < less(4, rows - i); row++)
                for (long v = 0; v < less(TILE, columns - c); v += LANES)
                    one_mix(inner, scale, left + row * h_row, h_column, w + c + v, columns, to + row * columns + v,
                            columns - c - v, add);
        }
}

/* The thread's share of to[j][o] = from[o][j], for `few` numbers in each of `many` rows; all threads wait. */
static void transpose(long many, long few, const float *from, float *to)
{
#pragma omp for schedule(static)
    for (long first = 0; first < many; first += TILE)
        for (long j = 0; j < few; j++)
            for (long o = first; o < less(many, first + TILE); o++)
                to[j * many + o] = from[o * few + j];
}

/* h = x A^T and y += scaling h B^T; rows of h lie h_step apart. Scratch: r * out numbers. */
void low_rank_forward(long rows, long in, long out, long r, long h_step, float scaling, const float *x, const float *A,
                      const float *B, float *scratch, float *h, float *y)
{
#pragma omp parallel if (rows > SMALL)
    {
        transpose(out, r, B, scratch);
#pragma omp for schedule(static)
        for (long i = 0; i < rows; i += BLOCK) {
            long count = less(BLOCK, rows - i);
            dots(count, in, r, 1.0f, x + i * in, A, h + i * h_step, h_step);
            mixes(count, r, out, scaling, h + i * h_step, h_step, 1, scratch, y + i * out, 1);
        }
    }
}

/* dh = scaling g B, dx = dh A (NULL: not wanted), dA = dh^T x and dB = scaling g^T h (both NULL: not wanted).
 * Scratch: r * (out + threads * (in + out + BLOCK)) numbers. */
void low_rank_backward(long rows, long in, long out, long r, long h_step, float scaling, const float *g,
                       const float *x, const float *h, const float *A, const float *B, float *scratch, float *dx,
                       float *dA, float *dB)
{
    long part = r * (in + out + BLOCK); /* numbers that a thread has for itself */
    float *turned = scratch, *parts = scratch + r * out;
#pragma omp parallel if (rows > SMALL)
    {
        long threads = omp_get_num_threads();
        float *own_A = parts + omp_get_thread_num() * part, *own_B = own_A + r * in, *dh = own_B + r * out;
        memset(own_A, 0, (size_t)(r * (in + out)) * sizeof(float));
        transpose(out, r, B, turned);
#pragma omp for schedule(static)
        for (long i = 0; i < rows; i += BLOCK) {
            long count = less(BLOCK, rows - i);
            dots(count, out, r, scaling, g + i * out, turned, dh, r);
            if (dA) {
                mixes(r, count, out, scaling, h + i * h_step, 1, h_step, g + i * out, own_B, 1);
                mixes(r, count, in, 1.0f, dh, 1, r, x + i * in, own_A, 1);
            }
            if (dx)
                mixes(count, r, in, 1.0f, dh, r, 1, A, dx + i * in, 0);
        }
        if (dA) {
#pragma omp for schedule(static)
            for (long k = 0; k < r * in; k++) {
                float sum = 0.0f;
                for (long t = 0; t < threads; t++)
                    sum += parts[t * part + k];
                dA[k] = sum;
            }
#pragma omp for schedule(static)
            for (long o = 0; o < out; o++)
                for (long j = 0; j < r; j++) {
                    float sum = 0.0f;
                    for (long t = 0; t < threads; t++)
                        sum += parts[t * part + r * in + j * out + o];
                    dB[o * r + j] = sum;
                }
        }
    }
}

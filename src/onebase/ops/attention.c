/* Attention over the tree of a flat batch, forward and backward, in fp32: ops/attention.py says what it computes.
 *
 * Queries are taken in blocks of rows, (token, head) pairs that share a key head; keys in blocks of KEYS positions of
 * the query's own example. In a block the scores stand transposed, a key a line and a row a lane, so that the softmax
 * runs along lines and no sum runs along a vector. Every product is then one kernel, sums of number times vector, and the
 * order of a sum's terms depends on positions in the example alone: neither on tiles, tails, threads nor neighbours.
 *
 * Backward, with unnormalised weights p = 2^(s - peak) and d' = d out / total, so that no weight is divided:
 *     dv = p^T d'     ds = p (d' v^T - sum(d' out))     dq = scale ds k     dk = scale ds^T q
 * Keys of other stretches than the rows' own (a shared prefix, the earlier parts of a long example) belong to several
 * tasks; each task adds up its part, and the parts are added in the order of the tasks.
 *
 * Compiled with contraction off: FUSED says where a product and a sum are one rounding, the same in tiles and tails.
 *
 * Source: online softmax, arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691 sec. 3.1.
 */
#include <stdint.h>
#include <string.h>

#if defined __AVX512F__
#include <immintrin.h>
#define LANES 16
#define WIDE 4 /* vectors of a tile; HIGH x WIDE sums stay in registers */
#define FUSED(a, b, c) ((vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define LARGER(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#elif defined __AVX2__ && defined __FMA__
#include <immintrin.h>
#define LANES 8
#define WIDE 2
#define FUSED(a, b, c) ((vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define LARGER(a, b) ((vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#elif defined __aarch64__
#include <arm_neon.h>
#define LANES 4
#define WIDE 4
#define FUSED(a, b, c) ((vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define LARGER(a, b) ((vec)vmaxq_f32((float32x4_t)(a), (float32x4_t)(b)))
#else
#define LANES 4
#define WIDE 2
#define FUSED(a, b, c) ((a) * (b) + (c))
#define LARGER(a, b) chosen((a) > (b), (a), (b))
#endif
#define HIGH 6
#define ROWS 192 /* of a block: 12 vectors */
#define KEYS 64
#define WIDEST 256 /* numbers of a head */
#define SMALL (1L << 20) /* multiplications: below that, waking threads costs more than it brings */
#define LOG2_E 1.44269504088896341f
#define LN_2 0.693147180559945309f
#define LOWEST -3e38f
#define FAR (1L << 40)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

struct rows { /* (tokens, heads, size) numbers where they lie */
    const float *at;
    long token, head, size;
};

struct call {
    long heads, kv_heads, causal, window;
    float scale;
    struct rows q, k, v;
};

struct piece { /* queries first .. first + count of a node; its ancestors' tokens are rows chain[0 .. depth] */
    long start, length, depth, chain, first, count;
};

struct block { /* rows of a piece beside keys; a row at distance low .. high from a key sees it */
    long place, group, rows, key, keys, low, high;
};

struct scratch {
    float q[ROWS * WIDEST], q_turned[WIDEST * ROWS], sums[ROWS * WIDEST];
    float d[ROWS * WIDEST], d_turned[WIDEST * ROWS], k[KEYS * WIDEST], v[KEYS * WIDEST], products[KEYS * WIDEST];
    float p[KEYS * ROWS], ds[KEYS * ROWS];
    float peak[ROWS], total[ROWS], factor[ROWS], less[ROWS];
    int32_t place[ROWS];
};

static _Thread_local struct scratch thread_room __attribute__((aligned(64)));

INLINE long smaller(long a, long b) { return a < b ? a : b; }
INLINE long larger(long a, long b) { return a > b ? a : b; }
INLINE long padded(long size) { return (size + LANES - 1) / LANES * LANES; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec load(const float *x) { return *(const loose *)x; }
INLINE void store(float *x, vec y) { *(loose *)x = y; }
INLINE vec chosen(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

/* 2^x for x <= 0, exactly 0 below -126.5: x = n + f, 2^f by Cephes' polynomial (exp2f.c); relative error 2e-7. */
INLINE vec power_of_two(vec x)
{
    x = LARGER(all(-127.0f), x); /* lets a NaN through */
    vec shifted = x + 12582912.0f, f = x - (shifted - 12582912.0f);
    vec p = all(1.535336188319500e-4f);
    p = FUSED(p, f, all(1.339887440266574e-3f));
    p = FUSED(p, f, all(9.618437357674640e-3f));
    p = FUSED(p, f, all(5.550332471162809e-2f));
    p = FUSED(p, f, all(2.402264791363012e-1f));
    p = FUSED(p, f, all(6.931472028550421e-1f));
    p = FUSED(p, f, all(1.0f));
    return p * (vec)(((ivec)shifted + 127) << 23);
}

#if LANES == 16
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#endif
#if defined __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Turn LANES vectors into their transpose: lines i and i + LANES / 2 dovetailed, log2(LANES) times. */
INLINE void turn(vec *x)
{
    vec y[LANES];
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = SHUFFLE(x[i], x[i + LANES / 2], LOW_HALVES);
            y[2 * i + 1] = SHUFFLE(x[i], x[i + LANES / 2], HIGH_HALVES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            x[i] = y[i];
    }
}

/* (count, ROWS) lines from (ROWS, count) rows, both of them padded. */
static void turn_rows(long rows, long count, const float *from, float *to)
{
    for (long row = 0; row < rows; row += LANES)
        for (long i = 0; i < count; i += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int line = 0; line < LANES; line++)
                x[line] = load(from + (row + line) * count + i);
            turn(x);
#pragma GCC unroll 16
            for (int line = 0; line < LANES; line++)
                store(to + (i + line) * ROWS + row, x[line]);
        }
}

/* One row's numbers times a factor, zeros behind them. */
INLINE void copy(const float *from, long size, float factor, float *to)
{
    long i = 0;
    for (; i + LANES <= size; i += LANES)
        store(to + i, load(from + i) * factor);
    if (i < size) {
        float rest[LANES] = {0};
        memcpy(rest, from + i, (size - i) * sizeof(float));
        store(to + i, load(rest) * factor);
    }
}

INLINE void add(const float *from, long size, float factor, float *to)
{
    long i = 0;
    for (; i + LANES <= size; i += LANES)
        store(to + i, FUSED(load(from + i), all(factor), load(to + i)));
    if (i < size) {
        float rest[LANES] = {0};
        memcpy(rest, to + i, (size - i) * sizeof(float));
        store(rest, FUSED(load(from + i), all(factor), load(rest)));
        memcpy(to + i, rest, (size - i) * sizeof(float));
    }
}

/* The rows of a block, (token, head) by (token, head), times factors (a row each, or one), and rows of zeros. */
static void gather(const struct block *b, long row, struct rows from, long head, const float *factors, float factor,
                   float *to)
{
    long size = padded(from.size), r = 0;
    for (const float *token = from.at + row * from.token + head * from.head; r < b->rows; token += from.token)
        for (long i = 0; i < b->group; i++, r++)
            copy(token + i * from.head, from.size, factors ? factors[r] : factor, to + r * size);
    memset(to + b->rows * size, 0, (padded(b->rows) - b->rows) * size * sizeof(float));
}

enum order { EVERY, KEYS_OF_ROWS, ROWS_OF_KEYS }; /* what a product sums over, for lines first .. last of the result */

INLINE void seen(const struct block *b, enum order order, long first, long last, long *from, long *to)
{
    if (order == KEYS_OF_ROWS) {
        *from = larger(0, b->place + first / b->group - b->high - b->key);
        *to = smaller(b->keys, b->place + last / b->group - b->low + 1 - b->key);
    } else if (order == ROWS_OF_KEYS) {
        *from = larger(0, (b->key + first + b->low - b->place) * b->group);
        *to = smaller(b->rows, (b->key + last + b->high + 1 - b->place) * b->group);
    }
}

/* high x wide sums over i of a[line * a_line + i * a_next] times the vectors of b[i * b_next]. */
#define TILE(high, wide)                                                                                               \
    {                                                                                                                  \
        vec sum[high][wide];                                                                                           \
        _Pragma("GCC unroll 6") for (int m = 0; m < high; m++)                                                         \
            _Pragma("GCC unroll 4") for (int n = 0; n < wide; n++) sum[m][n] = (vec){0};                               \
        for (long i = from; i < to; i++) {                                                                             \
            const float *one = a + i * a_next, *many = b + i * b_next;                                                 \
            vec x[wide];                                                                                               \
            _Pragma("GCC unroll 4") for (int n = 0; n < wide; n++) x[n] = load(many + n * LANES);                      \
            _Pragma("GCC unroll 6") for (int m = 0; m < high; m++)                                                     \
            {                                                                                                          \
                vec y = all(one[m * a_line]);                                                                          \
                _Pragma("GCC unroll 4") for (int n = 0; n < wide; n++) sum[m][n] = FUSED(y, x[n], sum[m][n]);          \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 6") for (int m = 0; m < high; m++)                                                         \
            _Pragma("GCC unroll 4") for (int n = 0; n < wide; n++)                                                     \
        {                                                                                                              \
            float *at = c + m * c_line + n * LANES;                                                                    \
            store(at, factors ? FUSED(load(at), all(factors[m]), sum[m][n]) : sum[m][n]);                              \
        }                                                                                                              \
        break;                                                                                                         \
    }
#define TILES(wide)                                                                                                    \
    case 10 * wide + 1: TILE(1, wide)                                                                                  \
    case 10 * wide + 2: TILE(2, wide)                                                                                  \
    case 10 * wide + 3: TILE(3, wide)                                                                                  \
    case 10 * wide + 4: TILE(4, wide)                                                                                  \
    case 10 * wide + 5: TILE(5, wide)                                                                                  \
    case 10 * wide + 6: TILE(6, wide)

static __attribute__((noinline)) void tile(long high, long wide, long from, long to, const float *a, long a_line, long a_next, const float *b,
                 long b_next, float *c, long c_line, const float *factors)
{
    switch (10 * wide + high) {
        TILES(1)
        TILES(2)
#if WIDE > 2
        TILES(3)
        TILES(4)
#endif
    }
}

/* c = a b, lines x (count padded to vectors); with factors, a line each: c = factor c + a b. */
static void product(const struct block *block, enum order order, long lines, long count, long terms, const float *a,
                    long a_line, long a_next, const float *b, long b_next, float *c, long c_line, const float *factors)
{
    long vectors = padded(count) / LANES;
    for (long line = 0; line < lines; line += HIGH) {
        long high = smaller(HIGH, lines - line), from = 0, to = terms;
        seen(block, order, line, line + high - 1, &from, &to);
        for (long n = 0; n < vectors; n += WIDE)
            tile(high, smaller(WIDE, vectors - n), from, to, a + line * a_line, a_line, a_next, b + n * LANES, b_next,
                 c + line * c_line + n * LANES, c_line, factors ? factors + line : NULL);
    }
}

INLINE ivec visible(const struct scratch *room, const struct block *b, long lane, long key)
{
    ivec distance = *(const ivec *)(room->place + lane) - (int32_t)(b->key + key);
    return (distance >= (int32_t)larger(b->low, -(1L << 30))) & (distance <= (int32_t)smaller(b->high, 1L << 30));
}

INLINE int is_whole(const struct block *b)
{
    return b->place - (b->key + b->keys - 1) >= b->low && b->place + (b->rows - 1) / b->group - b->key <= b->high;
}

/* Scores to weights 2^(s - peak), with the peaks and totals of all blocks so far; factor: what older sums are worth. */
static void weigh(struct scratch *room, const struct block *b)
{
    int whole = is_whole(b);
    for (long lane = 0; lane < b->rows; lane += LANES) {
        float *s = room->p + lane;
        vec old = load(room->peak + lane), peak = old, sum = {0};
        for (long key = 0; key < b->keys; key++) {
            vec x = load(s + key * ROWS);
            if (!whole)
                store(s + key * ROWS, x = chosen(visible(room, b, lane, key), x, all(-__builtin_inff())));
            peak = LARGER(x, peak);
        }
        for (long key = 0; key < b->keys; key++) {
            vec x = power_of_two(load(s + key * ROWS) - peak);
            store(s + key * ROWS, x);
            sum += x;
        }
        vec factor = power_of_two(old - peak);
        store(room->peak + lane, peak);
        store(room->factor + lane, factor);
        store(room->total + lane, FUSED(load(room->total + lane), factor, sum));
    }
}

/* Scores to weights again, and products d' v^T to ds. */
static void weigh_back(struct scratch *room, const struct block *b)
{
    int whole = is_whole(b);
    for (long lane = 0; lane < b->rows; lane += LANES) {
        vec peak = load(room->peak + lane), less = load(room->less + lane);
        for (long key = 0; key < b->keys; key++) {
            long at = key * ROWS + lane;
            vec x = power_of_two(load(room->p + at) - peak), d = x * (load(room->ds + at) - less);
            if (!whole) {
                ivec mask = visible(room, b, lane, key);
                x = (vec)((ivec)x & mask);
                d = (vec)((ivec)d & mask);
            }
            store(room->p + at, x);
            store(room->ds + at, d);
        }
    }
}

INLINE long row_of(const struct piece *p, const long *chain, long place)
{
    return place < p->depth ? chain[p->chain + place] : p->start + place - p->depth;
}

/* The rows from query `first` on and the stretch of keys that any of them sees; the next query is returned. */
INLINE long begin(struct scratch *room, const struct call *c, const struct piece *p, long first, struct block *b, long *from, long *to)
{
    long most = ROWS / (c->heads / c->kv_heads), end = p->first + p->count;
    long count = smaller(most, end - first), far = c->window > 0 ? c->window - 1 : FAR;
    *b = (struct block){.place = p->depth + first, .group = c->heads / c->kv_heads};
    b->rows = count * b->group;
    b->high = far;
    b->low = c->causal ? 0 : -far;
    *from = larger(0, b->place - b->high);
    *to = smaller(p->depth + p->length, b->place + count - b->low);
    for (long r = 0; r < padded(b->rows); r += b->group)
        for (long i = r; i < smaller(r + b->group, ROWS); i++)
            room->place[i] = (int32_t)(b->place + r / b->group);
    return first + count;
}

/* Keys and values of the block that begins at position `from`, up to the next multiple of KEYS; its end is returned. */
INLINE long take_keys(struct scratch *room, const struct call *c, const struct piece *p, const long *chain, long kv, long from, long to,
                      struct block *b)
{
    long end = smaller(to, (from / KEYS + 1) * KEYS);
    b->key = from;
    b->keys = end - from;
    for (long key = 0; key < b->keys; key++) {
        long row = row_of(p, chain, from + key);
        copy(c->k.at + row * c->k.token + kv * c->k.head, c->k.size, 1.0f, room->k + key * padded(c->k.size));
        copy(c->v.at + row * c->v.token + kv * c->v.head, c->v.size, 1.0f, room->v + key * padded(c->v.size));
    }
    return end;
}

INLINE void score(struct scratch *room, const struct call *c, const struct block *b)
{
    long size = padded(c->k.size);
    product(b, EVERY, b->keys, b->rows, c->k.size, room->k, size, 1, room->q_turned, ROWS, room->p, ROWS, NULL);
}

static void attend(const struct call *c, const struct piece *p, const long *chain, long kv, float *out, float *peaks,
                   float *inverses)
{
    long size = padded(c->q.size), size_v = padded(c->v.size), from, to;
    struct scratch *room = &thread_room;
    struct block b;
    for (long first = p->first, next; first < p->first + p->count; first = next) {
        next = begin(room, c, p, first, &b, &from, &to);
        gather(&b, p->start + first, c->q, kv * b.group, NULL, c->scale * LOG2_E, room->q);
        turn_rows(b.rows, size, room->q, room->q_turned);
        memset(room->sums, 0, b.rows * size_v * sizeof(float));
        for (long r = 0; r < padded(b.rows); r++)
            room->peak[r] = LOWEST, room->total[r] = 0.0f;
        while (from < to) {
            from = take_keys(room, c, p, chain, kv, from, to, &b);
            score(room, c, &b);
            weigh(room, &b);
            product(&b, KEYS_OF_ROWS, b.rows, size_v, b.keys, room->p, 1, ROWS, room->v, size_v, room->sums, size_v,
                    room->factor);
        }
        for (long r = 0; r < b.rows; r++) {
            long at = (p->start + first + r / b.group) * c->heads + kv * b.group + r % b.group;
            float inverse = inverses[at] = 1.0f / room->total[r];
            peaks[at] = room->peak[r];
            for (long i = 0; i < c->v.size; i++)
                out[at * c->v.size + i] = room->sums[r * size_v + i] * inverse;
        }
    }
}

INLINE int is_long(const struct call *c, const struct piece *pieces, long tasks, const long *task)
{
    long pairs = 0;
    for (const struct piece *p = pieces; p < pieces + task[3 * tasks - 2]; p++)
        pairs += p->count * (p->depth + p->first + p->count);
    return pairs * c->heads * c->q.size > SMALL;
}

/* task: its first piece, its end, and how many keys lie before the pieces of earlier tasks. */
void attention(long tasks, const long *task, const struct piece *pieces, const long *chain, const struct call *c,
               float *out, float *peaks, float *inverses)
{
#pragma omp parallel for schedule(dynamic) if (is_long(c, pieces, tasks, task))
    for (long i = 0; i < tasks * c->kv_heads; i++) {
        const long *t = task + 3 * (tasks - 1 - i / c->kv_heads); /* the last parts of a long example take longest */
        for (long piece = t[0]; piece < t[1]; piece++)
            attend(c, pieces + piece, chain, i % c->kv_heads, out, peaks, inverses);
    }
}

/* d' = d out / total, and sum(d' out), a number a row. */
static void begin_back(struct scratch *room, const struct call *c, const struct block *b, long row, long kv, struct rows out, struct rows d)
{
    long size = padded(c->q.size), size_v = padded(c->v.size), head = kv * b->group;
    gather(b, row, c->q, head, NULL, c->scale * LOG2_E, room->q);
    turn_rows(b->rows, size, room->q, room->q_turned);
    gather(b, row, d, head, room->total, 0.0f, room->d);
    turn_rows(b->rows, size_v, room->d, room->d_turned);
    gather(b, row, out, head, NULL, 1.0f, room->sums);
    for (long r = 0; r < b->rows; r += LANES) {
        vec part[LANES], sum = {0};
        for (int line = 0; line < LANES; line++) {
            const float *one = room->d + (r + line) * size_v, *other = room->sums + (r + line) * size_v;
            part[line] = (vec){0};
            for (long i = 0; i < size_v; i += LANES)
                part[line] = FUSED(load(one + i), load(other + i), part[line]);
        }
        turn(part);
        for (int line = 0; line < LANES; line++)
            sum += part[line];
        store(room->less + r, sum);
    }
    memset(room->sums, 0, b->rows * size * sizeof(float));
}

struct grads { /* of all tokens, (tokens, heads, size) contiguous; of the keys before a task's own, (places, size) */
    float *q, *k, *v, *k_before, *v_before;
    const float *peaks, *inverses;
    struct rows out, d;
};

/* One key head's gradients of a block of keys, added where they belong. */
INLINE void add_keys(float *products, const struct call *c, const struct piece *p, const struct block *b, long kv, const float *weights,
                     const float *rows, long size, float factor, float *own, float *before)
{
    product(b, ROWS_OF_KEYS, b->keys, size, b->rows, weights, ROWS, 1, rows, padded(size), products, padded(size), NULL);
    for (long key = 0; key < b->keys; key++) {
        long place = b->key + key, row = p->start + place - p->depth;
        float *to = place < p->depth + p->first ? before + place * size : own + (row * c->kv_heads + kv) * size;
        add(products + key * padded(size), size, factor, to);
    }
}

static void attend_back(const struct call *c, const struct piece *p, const long *chain, long kv, const struct grads *g)
{
    long size = padded(c->q.size), size_v = padded(c->v.size), from, to;
    struct scratch *room = &thread_room;
    struct block b;
    for (long row = p->start + p->first; row < p->start + p->first + p->count; row++) {
        memset(g->k + (row * c->kv_heads + kv) * c->k.size, 0, c->k.size * sizeof(float));
        memset(g->v + (row * c->kv_heads + kv) * c->v.size, 0, c->v.size * sizeof(float));
    }
    for (long first = p->first, next; first < p->first + p->count; first = next) {
        next = begin(room, c, p, first, &b, &from, &to);
        for (long r = 0; r < padded(b.rows); r++) {
            long at = (p->start + first + r / b.group) * c->heads + kv * b.group + r % b.group;
            room->peak[r] = r < b.rows ? g->peaks[at] : 0.0f;
            room->total[r] = r < b.rows ? g->inverses[at] : 0.0f;
        }
        begin_back(room, c, &b, p->start + first, kv, g->out, g->d);
        for (long r = 0; r < b.rows; r++)
            room->factor[r] = 1.0f;
        while (from < to) {
            from = take_keys(room, c, p, chain, kv, from, to, &b);
            score(room, c, &b);
            product(&b, EVERY, b.keys, b.rows, c->v.size, room->v, size_v, 1, room->d_turned, ROWS, room->ds, ROWS, NULL);
            weigh_back(room, &b);
            add_keys(room->products, c, p, &b, kv, room->p, room->d, c->v.size, 1.0f, g->v, g->v_before);
            add_keys(room->products, c, p, &b, kv, room->ds, room->q, c->k.size, LN_2, g->k, g->k_before);
            product(&b, KEYS_OF_ROWS, b.rows, size, b.keys, room->ds, 1, ROWS, room->k, size, room->sums, size, room->factor);
        }
        for (long r = 0; r < b.rows; r++) {
            long at = (p->start + first + r / b.group) * c->heads + kv * b.group + r % b.group;
            for (long i = 0; i < c->q.size; i++)
                g->q[at * c->q.size + i] = room->sums[r * size + i] * c->scale;
        }
    }
}

/* k_before, v_before: for every task (kv_heads, keys before its own, size) numbers, from place task[2] on. */
void attention_gradient(long tasks, const long *task, const struct piece *pieces, const long *chain,
                        const struct call *c, const struct grads *g)
{
#pragma omp parallel for schedule(dynamic) if (is_long(c, pieces, tasks, task))
    for (long i = 0; i < tasks * c->kv_heads; i++) {
        const long *t = task + 3 * (tasks - 1 - i / c->kv_heads);
        long kv = i % c->kv_heads, before = pieces[t[0]].depth + pieces[t[0]].first;
        struct grads own = *g;
        own.k_before += (t[2] * c->kv_heads + kv * before) * c->k.size;
        own.v_before += (t[2] * c->kv_heads + kv * before) * c->v.size;
        memset(own.k_before, 0, before * c->k.size * sizeof(float));
        memset(own.v_before, 0, before * c->v.size * sizeof(float));
        for (long piece = t[0]; piece < t[1]; piece++)
            attend_back(c, pieces + piece, chain, kv, &own);
    }
#pragma omp parallel for schedule(static) if (is_long(c, pieces, tasks, task))
    for (long kv = 0; kv < 2 * c->kv_heads; kv++)
        for (long i = 0; i < tasks; i++) {
            const struct piece *p = pieces + task[3 * i];
            long before = p->depth + p->first, head = kv / 2, size = kv % 2 ? c->v.size : c->k.size;
            const float *from = (kv % 2 ? g->v_before : g->k_before) + (task[3 * i + 2] * c->kv_heads + head * before) * size;
            float *to = kv % 2 ? g->v : g->k;
            for (long place = 0; place < before; place++)
                add(from + place * size, size, 1.0f, to + (row_of(p, chain, place) * c->kv_heads + head) * size);
        }
}

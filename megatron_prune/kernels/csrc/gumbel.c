/* Learnable N:M masks on the CPU: noise, softmax over patterns, mask and masked weight in one pass, and the
 * gradient of all that in another, recomputing the noise. Same maths as the PyTorch reference in ../gumbel.py.
 *
 * Layout. A weight [rows, groups * m] and its logits [rows, groups, patterns] are contiguous, so group g of the flat
 * index row * groups + column owns weight[g*m .. g*m+m) and logits[g*patterns ..). Work goes in tiles of TILE
 * consecutive groups. Inside a tile everything is transposed, "pattern by lane":
 *
 *     memory   o00 o01 .. o0P | o10 o11 .. o1P | ...        tile   z[k][lane], lane = group within the tile
 *
 * so that every inner loop runs over TILE lanes with unit stride and becomes vector instructions of any width.
 * A tile lives on the stack (30 KB at most, 8 KB for 2:4): extra memory does not grow with the weight. */

#include <stdint.h>
#include <string.h>

#define TILE 64
#define MAX_M 8
#define MAX_PATTERNS 70 /* C(8, 4) */
#define LANES _Pragma("omp simd") for (int t = 0; t < TILE; t++)

/* Mirrored by `_Arguments` in ../gumbel.py: same order, same widths. */
typedef struct {
    int64_t rows, groups;                /* of this shard */
    int64_t first_group, groups_per_row; /* column offset and width in the unsharded weight, in groups */
    const int64_t *row_ids;              /* [rows] row of the unsharded weight */
    const uint8_t *pattern_bits;         /* [patterns] bit i set: pattern keeps input i */
    const void *weight, *logits;         /* fp32, or bf16 where the flag says so */
    const void *grad_output;             /* as weight */
    void *masked_weight, *grad_weight;   /* as weight; grad_weight is NULL where not wanted */
    void *grad_logits;                   /* fp32 or bf16; NULL where not wanted */
    int32_t m, patterns;
    int32_t weight_bf16, logits_bf16, grad_logits_bf16;
    int32_t noise, hard, accumulate, threads;
    uint32_t key[2];
    float scale, inverse_temperature, regularization;
} Arguments;

typedef struct {
    float e[MAX_PATTERNS][TILE]; /* scaled noisy logits, then exp((. - max) / temperature) */
    float inverse_sum[TILE];     /* probability of pattern k is e[k] * inverse_sum */
    float soft[MAX_M][TILE];     /* expected mask */
    float mask[MAX_M][TILE];     /* mask of the forward pass: soft, or the winner's pattern */
    float weight[MAX_M][TILE];
    float grad[MAX_M][TILE];
    int32_t winner[TILE];
} Tile;

/* ---- numbers ---------------------------------------------------------------------------------------------- */

static inline float from_bits(uint32_t x) { union { uint32_t u; float f; } v = {.u = x}; return v.f; }
static inline uint32_t to_bits(float x) { union { float f; uint32_t u; } v = {.f = x}; return v.u; }
static inline float from_bf16(uint16_t x) { return from_bits((uint32_t)x << 16); }

/* Round to nearest even. Values are finite here. */
static inline uint16_t to_bf16(float x) {
    uint32_t u = to_bits(x);
    return (uint16_t)((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

/* log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]: f - f^2/2 + f^3 r(f), minimax r (the coefficients of Cephes
 * logf, Moshier 1989). Exact relative accuracy near f = 0. */
static inline float log1p_core(float f) {
    float r = 7.0376836292e-2f;
    r = r * f - 1.1514610310e-1f;
    r = r * f + 1.1676998740e-1f;
    r = r * f - 1.2420140846e-1f;
    r = r * f + 1.4249322787e-1f;
    r = r * f - 1.6668057665e-1f;
    r = r * f + 2.0000714765e-1f;
    r = r * f - 2.4999993993e-1f;
    r = r * f + 3.3333331174e-1f;
    float square = f * f;
    return f + (square * f * r - 0.5f * square);
}

#define SQRT_HALF_BITS 0x3F3504F3u

/* log(x) for finite normal x > 0: x = 2^n (1 + f), n * ln 2 in two parts. */
static inline float fast_log(float x) {
    uint32_t shifted = to_bits(x) - SQRT_HALF_BITS;
    int32_t n = (int32_t)shifted >> 23;
    float f = from_bits((shifted & 0x007FFFFFu) + SQRT_HALF_BITS) - 1.0f;
    float exponent = (float)n;
    return exponent * 0.693359375f + (exponent * -2.12194440e-4f + log1p_core(f));
}

/* exp(x) for x <= 0, about 1 ulp; below -87 the smallest normal power stands in for the (negligible) value. */
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504088896341f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * from_bits((uint32_t)((int32_t)n + 127) << 23);
}

/* Gumbel variate of a 32-bit word: -log(-log(u)), u = (2 k + 1) / 2^25 with k the top 24 bits. The odd integer needs
 * 25 bits; towards u = 1 the distance to 1 is taken as an integer, which is exact, in place of u. */
static inline float gumbel(uint32_t word) {
    int32_t odd = (int32_t)(word >> 8) * 2 + 1;
    int32_t left = (1 << 25) - odd;
    int near_one = odd >= 23726566; /* sqrt(1/2) * 2^25 */
    uint32_t shifted = to_bits((float)odd * 0x1p-25f) - SQRT_HALF_BITS;
    int32_t n = near_one ? 0 : (int32_t)shifted >> 23;
    float f = from_bits((shifted & 0x007FFFFFu) + SQRT_HALF_BITS) - 1.0f;
    f = near_one ? (float)left * -0x1p-25f : f;
    float exponent = (float)n;
    float log_u = exponent * 0.693359375f + (exponent * -2.12194440e-4f + log1p_core(f));
    return -fast_log(-log_u);
}

/* ---- a tile in and out -------------------------------------------------------------------------------------- */

/* out[k][t] = in[t * stride + k], and back. With AVX-512 by permutations, sixteen numbers at a time: the loops become
 * gathers and scatters there, which take six times as long. */
#ifdef __AVX512F__
#include <immintrin.h>

static inline __attribute__((always_inline)) void scatter_lanes(float (*out)[TILE], const float *in, int stride) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int k = 0; k < stride; k++) {
        __m512i place = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(stride)), _mm512_set1_epi32(k));
        __m512i vector = _mm512_srli_epi32(place, 4); /* a permutation looks at the low four bits of `place` */
        __m512 found[TILE / 16];
        for (int block = 0; block < TILE / 16; block++) found[block] = _mm512_setzero_ps();
        for (int v = 0; v < stride; v++) {
            __mmask16 here = _mm512_cmpeq_epi32_mask(vector, _mm512_set1_epi32(v));
            for (int block = 0; block < TILE / 16; block++) {
                __m512 source = _mm512_loadu_ps(in + (block * stride + v) * 16);
                found[block] = _mm512_mask_permutexvar_ps(found[block], here, place, source);
            }
        }
        for (int block = 0; block < TILE / 16; block++) _mm512_storeu_ps(out[k] + 16 * block, found[block]);
    }
}

static inline __attribute__((always_inline)) void collect_lanes(float *out, float (*in)[TILE], int stride) {
    for (int v = 0; v < stride; v++) {
        int32_t place[16], pattern[16];
        for (int i = 0; i < 16; i++) place[i] = (v * 16 + i) / stride;
        for (int i = 0; i < 16; i++) pattern[i] = (v * 16 + i) % stride;
        __m512i lanes = _mm512_loadu_si512(place), patterns = _mm512_loadu_si512(pattern);
        __m512 found[TILE / 16];
        for (int block = 0; block < TILE / 16; block++) found[block] = _mm512_setzero_ps();
        for (int k = 0; k < stride; k++) {
            __mmask16 here = _mm512_cmpeq_epi32_mask(patterns, _mm512_set1_epi32(k));
            for (int block = 0; block < TILE / 16; block++) {
                __m512 source = _mm512_loadu_ps(in[k] + 16 * block);
                found[block] = _mm512_mask_permutexvar_ps(found[block], here, lanes, source);
            }
        }
        for (int block = 0; block < TILE / 16; block++)
            _mm512_storeu_ps(out + (block * stride + v) * 16, found[block]);
    }
}
#else
static inline __attribute__((always_inline)) void scatter_lanes(float (*out)[TILE], const float *in, int stride) {
    for (int k = 0; k < stride; k++) LANES out[k][t] = in[t * stride + k];
}

static inline __attribute__((always_inline)) void collect_lanes(float *out, float (*in)[TILE], int stride) {
    for (int k = 0; k < stride; k++) LANES out[t * stride + k] = in[k][t];
}
#endif

#define WITH_STRIDE(CALL, A, B, STRIDE) \
    if ((STRIDE) == 4) CALL(A, B, 4); else if ((STRIDE) == 6) CALL(A, B, 6); \
    else if ((STRIDE) == 8) CALL(A, B, 8); else CALL(A, B, STRIDE)

/* Elements [first, first + count) * stride of a tensor into out[stride][TILE]; lanes past `count` are zero. */
static void load_tile(float (*out)[TILE], const void *data, int bf16, int64_t first, int count, int stride) {
    float flat[MAX_PATTERNS * TILE];
    const float *source = flat;
    int size = count * stride;
    if (bf16) {
        const uint16_t *in = (const uint16_t *)data + first * stride;
        for (int i = 0; i < size; i++) flat[i] = from_bf16(in[i]);
    } else if (count == TILE) {
        source = (const float *)data + first * stride;
    } else {
        memcpy(flat, (const float *)data + first * stride, sizeof(float) * size);
    }
    if (count < TILE) memset(flat + size, 0, sizeof(float) * (TILE * stride - size));
    WITH_STRIDE(scatter_lanes, out, source, stride);
}

/* in[stride][TILE] to elements [first, first + count) * stride, replacing them or (fp32 only) adding to them. */
static void store_tile(void *data, float (*in)[TILE], int bf16, int add, int64_t first, int count, int stride) {
    float flat[MAX_PATTERNS * TILE];
    int size = count * stride;
    WITH_STRIDE(collect_lanes, flat, in, stride);
    if (bf16) {
        uint16_t *out = (uint16_t *)data + first * stride;
        for (int i = 0; i < size; i++) out[i] = to_bf16(flat[i]);
        return;
    }
    float *out = (float *)data + first * stride;
    if (add) for (int i = 0; i < size; i++) out[i] += flat[i];
    else memcpy(out, flat, sizeof(float) * size);
}

/* Index in the unsharded weight of each group of the tile; lanes past the last row hold any number. */
static void global_groups(const Arguments *a, int64_t first, uint64_t *index) {
    int64_t row = first / a->groups, column = first % a->groups;
    for (int t = 0; t < TILE;) {
        int64_t left = row < a->rows ? a->groups - column : TILE;
        int run = left < TILE - t ? (int)left : TILE - t;
        int64_t id = a->row_ids[row < a->rows ? row : a->rows - 1];
        uint64_t base = (uint64_t)(id * a->groups_per_row + a->first_group + column);
        for (int i = 0; i < run; i++) index[t + i] = base + (uint64_t)i;
        t += run;
        row++;
        column = 0;
    }
}

/* ---- the maths of a tile ------------------------------------------------------------------------------------ */

#define LOW(x) ((x) & 0xFFFFFFFFu)

/* Philox4x32-10 of one counter per lane, four words each. Words sit in 64-bit lanes whose high halves are ignored,
 * so that a round is two multiplications, two shifts and the exclusive ors. */
static void philox(const uint64_t *block, const uint32_t *key, uint32_t (*words)[TILE]) {
    LANES {
        uint64_t c0 = block[t], c1 = block[t] >> 32, c2 = 0, c3 = 0;
        uint32_t k0 = key[0], k1 = key[1];
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
            uint64_t p0 = LOW(c0) * UINT64_C(0xD2511F53), p1 = LOW(c2) * UINT64_C(0xCD9E8D57);
            c0 = (p1 >> 32) ^ c1 ^ k0;
            c2 = (p0 >> 32) ^ c3 ^ k1;
            c1 = p1;
            c3 = p0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        words[0][t] = (uint32_t)c0;
        words[1][t] = (uint32_t)c1;
        words[2][t] = (uint32_t)c2;
        words[3][t] = (uint32_t)c3;
    }
}

static void add_noise(const Arguments *a, int64_t first, Tile *s) {
    uint64_t index[TILE], block[TILE];
    uint32_t words[4][TILE];
    int blocks = (a->patterns + 3) / 4;
    global_groups(a, first, index);
    for (int j = 0; j < blocks; j++) {
        LANES block[t] = index[t] * (uint64_t)blocks + (uint64_t)j;
        philox(block, a->key, words);
        for (int q = 0; q < 4 && 4 * j + q < a->patterns; q++) {
            float *z = s->e[4 * j + q];
            const uint32_t *w = words[q];
            LANES z[t] += gumbel(w[t]);
        }
    }
}

/* The largest of each lane and its pattern, the lowest where several are equal. */
static void find_winner(const Arguments *a, Tile *s, float *largest) {
    LANES { largest[t] = s->e[0][t]; s->winner[t] = 0; }
    for (int k = 1; k < a->patterns; k++) {
        LANES {
            s->winner[t] = s->e[k][t] > largest[t] ? k : s->winner[t];
            largest[t] = s->e[k][t] > largest[t] ? s->e[k][t] : largest[t];
        }
    }
}

static void load_logits(const Arguments *a, int64_t first, int count, Tile *s) {
    load_tile(s->e, a->logits, a->logits_bf16, first, count, a->patterns);
    for (int k = 0; k < a->patterns; k++) LANES s->e[k][t] *= a->scale;
    if (a->noise) add_noise(a, first, s);
}

static void soft_mask(const Arguments *a, Tile *s, const float *largest) {
    float sum[TILE] = {0};
    memset(s->soft, 0, sizeof(s->soft[0]) * a->m);
    for (int k = 0; k < a->patterns; k++) {
        float *e = s->e[k];
        LANES {
            e[t] = fast_exp((e[t] - largest[t]) * a->inverse_temperature);
            sum[t] += e[t];
        }
        for (int i = 0; i < a->m; i++)
            if (a->pattern_bits[k] >> i & 1) LANES s->soft[i][t] += e[t];
    }
    LANES s->inverse_sum[t] = 1.0f / sum[t];
    for (int i = 0; i < a->m; i++) LANES s->soft[i][t] *= s->inverse_sum[t];
}

static void hard_mask(const Arguments *a, Tile *s) {
    int32_t bits[TILE];
    for (int t = 0; t < TILE; t++) bits[t] = a->pattern_bits[s->winner[t]];
    for (int i = 0; i < a->m; i++) LANES s->mask[i][t] = (float)(bits[t] >> i & 1);
}

/* Everything up to the mask of the forward pass, and the weight. */
static void compute_mask(const Arguments *a, int64_t first, int count, Tile *s) {
    float largest[TILE];
    load_logits(a, first, count, s);
    find_winner(a, s, largest);
    soft_mask(a, s, largest);
    if (a->hard) hard_mask(a, s);
    else memcpy(s->mask, s->soft, sizeof(s->mask[0]) * a->m);
    load_tile(s->weight, a->weight, a->weight_bf16, first, count, a->m);
}

/* grad (of the masked weight) becomes the gradient of the mask; returns through `mean` its average under p. */
static void mask_gradient(const Arguments *a, Tile *s, float *mean) {
    for (int i = 0; i < a->m; i++) {
        LANES {
            float w = s->weight[i][t];
            s->grad[i][t] = w * (s->grad[i][t] - 2.0f * a->regularization * w * s->mask[i][t]);
            mean[t] += s->soft[i][t] * s->grad[i][t];
        }
    }
}

/* e[k] becomes the gradient of logit k: scale / temperature * p_k * (sum of grad over kept inputs - mean). */
static void logit_gradient(const Arguments *a, Tile *s, const float *mean) {
    float factor = a->scale * a->inverse_temperature;
    for (int k = 0; k < a->patterns; k++) {
        float sum[TILE];
        LANES sum[t] = -mean[t];
        for (int i = 0; i < a->m; i++)
            if (a->pattern_bits[k] >> i & 1) LANES sum[t] += s->grad[i][t];
        LANES s->e[k][t] *= factor * s->inverse_sum[t] * sum[t];
    }
}

/* ---- entry points ------------------------------------------------------------------------------------------- */

/* Dynamic schedules where threads only write, since a core may be shared with others; a static one where they add, so
 * that equal calls give equal sums. */
#define FOR_TILES(PRAGMA) \
    int64_t total = a->rows * a->groups, tiles = (total + TILE - 1) / TILE; \
    _Pragma(PRAGMA) for (int64_t i = 0; i < tiles; i++)
#define TILE_RANGE \
    int64_t first = i * TILE; \
    int count = total - first < TILE ? (int)(total - first) : TILE

void gumbel_forward(const Arguments *a) {
    FOR_TILES("omp parallel for schedule(dynamic, 32) num_threads(a->threads)") {
        TILE_RANGE;
        Tile s;
        compute_mask(a, first, count, &s);
        for (int j = 0; j < a->m; j++) LANES s.weight[j][t] *= s.mask[j][t];
        store_tile(a->masked_weight, s.weight, a->weight_bf16, 0, first, count, a->m);
    }
}

void gumbel_backward(const Arguments *a) {
    FOR_TILES("omp parallel for schedule(dynamic, 32) num_threads(a->threads)") {
        TILE_RANGE;
        Tile s;
        float mean[TILE] = {0};
        compute_mask(a, first, count, &s);
        load_tile(s.grad, a->grad_output, a->weight_bf16, first, count, a->m);
        if (a->grad_weight) {
            float grad_weight[MAX_M][TILE];
            for (int j = 0; j < a->m; j++) LANES grad_weight[j][t] = s.mask[j][t] * s.grad[j][t];
            store_tile(a->grad_weight, grad_weight, a->weight_bf16, 0, first, count, a->m);
        }
        if (!a->grad_logits) continue;
        mask_gradient(a, &s, mean);
        logit_gradient(a, &s, mean);
        store_tile(a->grad_logits, s.e, a->grad_logits_bf16, a->accumulate, first, count, a->patterns);
    }
}

/* winners[g]: pattern with the largest logit, the lowest where several are equal; sums: of their probabilities, without
 * noise, and of the entropies in nats. */
void gumbel_winners(const Arguments *a, uint8_t *winners, double *sums) {
    float sharpness = a->scale * a->inverse_temperature;
    double probability = 0, entropy = 0;
    FOR_TILES("omp parallel for schedule(static) num_threads(a->threads) reduction(+ : probability, entropy)") {
        TILE_RANGE;
        Tile s;
        float largest[TILE], total[TILE] = {0}, moment[TILE] = {0}, best[TILE], chaos[TILE], sure = 0, unsure = 0;
        load_tile(s.e, a->logits, a->logits_bf16, first, count, a->patterns);
        find_winner(a, &s, largest);
        for (int k = 0; k < a->patterns; k++) {
            LANES {
                float exponent = (s.e[k][t] - largest[t]) * sharpness, e = fast_exp(exponent);
                total[t] += e;
                moment[t] += e * exponent;
            }
        }
        LANES best[t] = 1.0f / total[t];
        LANES chaos[t] = fast_log(total[t]) - moment[t] * best[t];
        for (int t = 0; t < count; t++) winners[first + t] = (uint8_t)s.winner[t];
#pragma omp simd reduction(+ : sure, unsure)
        for (int t = 0; t < count; t++) {
            sure += best[t];
            unsure += chaos[t];
        }
        probability += sure;
        entropy += unsure;
    }
    sums[0] = probability;
    sums[1] = entropy;
}

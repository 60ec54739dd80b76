/* One sweep of the second-order solver (SparseGPT, arXiv 2301.00774, section 3) over the columns [first, last) of
 * w [rows, in], float32, row-major. A removed weight's error goes to the columns on its right, through the rows of
 * u [in, in], the upper Cholesky factor of the inverse Hessian.
 *
 * Rows are independent and each is computed by the same operations in the same order wherever it stands, so the
 * result does not depend on threads or on how rows are shared between processes, bit for bit.
 *
 * Columns go in steps of about STEP: inside a step each error is spread at once; the columns behind it are updated
 * once a step, by the errors of the removed weights only, half the work of a dense product at 2:4. */

#include <stdint.h>

enum { STEP = 32, TILE = 32, CHUNK = 512, LANES = 16, UNROLL = 4, MAX_M = 16 };

typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

typedef struct {
    float error[STEP];
    const float *factor[STEP]; /* row of u of each removed weight */
    int64_t count;
} removed;

/* Mark the n highest of m scores (w / d)^2, of equal ones the last; inputs that never fired lose to all others. */
static void choose(const float *w, const float *d, const uint8_t *live, int64_t n, int64_t m, uint8_t *keep)
{
    float score[MAX_M];
    for (int64_t i = 0; i < m; i++) {
        float root = w[i] / d[i];
        score[i] = live[i] ? root * root : -1.0f;
    }
    for (int64_t i = 0; i < m; i++) {
        int64_t losses = 0;
        for (int64_t j = 0; j < m; j++)
            losses += j <= i ? score[j] > score[i] : score[j] >= score[i];
        keep[i] = losses < n;
    }
}

/* Columns [first, last) of one row: remove, spread the errors as far as last, and note them in gone. */
static void step(float *w, uint8_t *keep, const float *u, const float *d, const uint8_t *live, int64_t in,
                 int64_t first, int64_t last, int64_t n, int64_t m, removed *gone)
{
    gone->count = 0;
    for (int64_t j = first; j < last; j++) {
        if (m && (j - first) % m == 0)
            choose(w + j, d + j, live + j, n, m, keep + j);
        if (keep[j])
            continue;
        const float *factor = u + j * in;
        float error = w[j] / d[j];
        w[j] = 0.0f;
        for (int64_t k = j + 1; k < last; k++)
            w[k] -= error * factor[k];
        gone->error[gone->count] = error;
        gone->factor[gone->count++] = factor;
    }
}

/* w[k] -= sum of error * factor[k], for the columns [first, last) of one row. */
static void spread(float *w, int64_t first, int64_t last, const removed *gone)
{
    int64_t k = first;
    for (; k + UNROLL * LANES <= last; k += UNROLL * LANES) {
        lanes *at = (lanes *)(w + k);
        lanes a = at[0], b = at[1], c = at[2], e = at[3];
        for (int64_t p = 0; p < gone->count; p++) {
            const lanes *factor = (const lanes *)(gone->factor[p] + k);
            float error = gone->error[p];
            a -= error * factor[0];
            b -= error * factor[1];
            c -= error * factor[2];
            e -= error * factor[3];
        }
        at[0] = a, at[1] = b, at[2] = c, at[3] = e;
    }
    for (; k < last; k++) {
        float sum = w[k];
        for (int64_t p = 0; p < gone->count; p++)
            sum -= gone->error[p] * gone->factor[p][k];
        w[k] = sum;
    }
}

/* All columns [first, last) of a few rows; every panel of u serves all of them while it is in the cache. */
static void tile(float *w, uint8_t *keep, const float *u, const float *d, const uint8_t *live, int64_t rows,
                 int64_t in, int64_t first, int64_t last, int64_t n, int64_t m)
{
    removed gone[TILE];
    int64_t width = m ? STEP / m * m : STEP;
    for (int64_t start = first; start < last; start += width) {
        int64_t end = start + width < last ? start + width : last;
        for (int64_t r = 0; r < rows; r++)
            step(w + r * in, keep + r * in, u, d, live, in, start, end, n, m, &gone[r]);
        for (int64_t k = end; k < in; k += CHUNK)
            for (int64_t r = 0; r < rows; r++)
                spread(w + r * in, k, k + CHUNK < in ? k + CHUNK : in, &gone[r]);
    }
}

/* w and keep are updated in place. m > 0: write keep, N:M with first a multiple of m; m = 0: obey keep as given.
 * d [in] is the diagonal of u; live [in] is 0 for inputs that never fired. */
void second_order_sweep(float *w, uint8_t *keep, const float *u, const float *d, const uint8_t *live, int64_t rows,
                        int64_t in, int64_t first, int64_t last, int64_t n, int64_t m, int threads)
{
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t r = 0; r < rows; r += TILE)
        tile(w + r * in, keep + r * in, u, d, live, rows - r < TILE ? rows - r : TILE, in, first, last, n, m);
}

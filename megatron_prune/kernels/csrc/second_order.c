/* One sweep of the second-order solver (SparseGPT, arXiv 2301.00774, section 3) over the columns [first, last) of
 * w [rows, in], float32, row-major. A removed weight's error goes to the columns on its right, through the rows of
 * u [in, in], the upper Cholesky factor of the inverse Hessian.
 *
 * Rows are independent and each is computed by the same operations in the same order wherever it stands, so the
 * result does not depend on threads or on how rows are shared between processes, bit for bit.
 *
 * Columns go in steps of about STEP. Inside a step a vector holds one column of GROUP rows. The columns behind it, up
 * to the end of about LAZY columns, are updated once a step, and those behind them once for all: by a dense product,
 * ROWS rows at a time, with the rows of u packed side by side: in u itself they lie a power of two apart in many models
 * and would push one another out of the cache. Weights that stay have error 0, which changes no bit; leaving them out
 * would halve the work and cost more in loads of u, which rows then cannot share. */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16, UNROLL = 3 };
#else
enum { LANES = 8, UNROLL = 1 };
#endif
enum { STEP = 32, LAZY = 128, GROUP = 16, GROUPS = 16, ROWS = 8, CHUNK = 240, MAX_M = 16 };

typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef float column __attribute__((vector_size(GROUP * sizeof(float)), may_alias));
typedef int32_t truth __attribute__((vector_size(GROUP * sizeof(int32_t)))); /* -1 or 0 for each row */

/* What stays the same for a whole sweep. */
typedef struct {
    const float *u, *d; /* d [in]: the diagonal of u */
    const uint8_t *live;
    int64_t in, n, m;
} problem;

/* Mark the n highest of m scores (w / d)^2, of equal ones the last; inputs that never fired lose to all others. All stay
 * in a group that keep says nothing of. */
static void choose(const problem *p, const column *w, int64_t first, truth *keep)
{
    column score[MAX_M];
    truth losses[MAX_M] = {{0}};
    for (int64_t i = 0; i < p->m; i++) {
        column root = w[i] / p->d[first + i];
        score[i] = p->live[first + i] ? root * root : (column){0} - 1.0f;
    }
    for (int64_t low = 0; low < p->m; low++)
        for (int64_t high = low + 1; high < p->m; high++) {
            truth beaten = score[high] >= score[low];
            losses[low] -= beaten;
            losses[high] -= ~beaten;
        }
    truth whole = ~keep[0];
    for (int64_t i = 0; i < p->m; i++)
        keep[i] = (losses[i] < (int32_t)p->n) | whole;
}

/* Columns [first, last) of a group of rows: remove, spread the errors as far as last, and note them. */
static void step(const problem *p, float *w, uint8_t *keep, int64_t rows, int64_t first, int64_t last,
                 float inner[STEP][STEP], column error[STEP])
{
    column value[STEP] = {{0}};
    truth kept[STEP] = {{0}};
    int64_t width = last - first;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < width; k++) {
            value[k][r] = w[r * p->in + first + k];
            kept[k][r] = -(int32_t)keep[r * p->in + first + k];
        }
    for (int64_t j = 0; j < width; j++) {
        if (p->m && j % p->m == 0)
            choose(p, value + j, first + j, kept + j);
        error[j] = (column)((truth)(value[j] / p->d[first + j]) & ~kept[j]);
        value[j] = (column)((truth)value[j] & kept[j]);
        for (int64_t k = j + 1; k < width; k++)
            value[k] -= error[j] * inner[j][k];
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < width; k++) {
            w[r * p->in + first + k] = value[k][r];
            keep[r * p->in + first + k] = (uint8_t)-kept[k][r];
        }
}

/* row[r][k] -= sum over j of error[j][r] * panel[j][k], for ROWS rows; width is a multiple of the unit. */
static void spread(float *const row[ROWS], int64_t width, const float (*error)[GROUP], int64_t columns,
                   float panel[LAZY][CHUNK])
{
    for (int64_t k = 0; k < width; k += UNROLL * LANES) {
        lanes sum[ROWS][UNROLL];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int i = 0; i < UNROLL; i++)
                sum[r][i] = ((lanes *)(row[r] + k))[i];
        for (int64_t j = 0; j < columns; j++)
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
                for (int i = 0; i < UNROLL; i++)
                    sum[r][i] -= error[j][r] * ((lanes *)(panel[j] + k))[i];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int i = 0; i < UNROLL; i++)
                ((lanes *)(row[r] + k))[i] = sum[r][i];
    }
}

/* `spread` of the columns [first, first + width) of up to ROWS rows; what is missing is filled up in a copy. */
static void spread_part(float *w, int64_t in, int64_t rows, int64_t first, int64_t width, const float (*error)[GROUP],
                        int64_t columns, float panel[LAZY][CHUNK])
{
    float copy[ROWS][CHUNK] = {{0}};
    float *row[ROWS];
    int whole = rows == ROWS && width == CHUNK;
    for (int64_t r = 0; r < ROWS; r++) {
        row[r] = whole ? w + r * in + first : copy[r];
        if (!whole && r < rows)
            memcpy(copy[r], w + r * in + first, (size_t)width * sizeof(float));
    }
    spread(row, (width + UNROLL * LANES - 1) / (UNROLL * LANES) * (UNROLL * LANES), error, columns, panel);
    for (int64_t r = 0; r < rows && !whole; r++)
        memcpy(w + r * in + first, copy[r], (size_t)width * sizeof(float));
}

/* Copy u [first, last) x [k, k + width), zero where it ends. */
static void pack(const problem *p, int64_t first, int64_t last, int64_t k, int64_t width, float panel[LAZY][CHUNK])
{
    for (int64_t j = first; j < last; j++) {
        memcpy(panel[j - first], p->u + j * p->in + k, (size_t)width * sizeof(float));
        memset(panel[j - first] + width, 0, (size_t)(CHUNK - width) * sizeof(float));
    }
}

/* The columns [from, to) of up to GROUPS groups of rows, after the errors of [first, last). */
static void behind(const problem *p, float *w, int64_t rows, int64_t first, int64_t last, int64_t from, int64_t to,
                   column error[GROUPS][LAZY], int64_t noted)
{
    float panel[LAZY][CHUNK];
    for (int64_t k = from; k < to; k += CHUNK) {
        int64_t part = to - k < CHUNK ? to - k : CHUNK;
        pack(p, first, last, k, part, panel);
        for (int64_t r = 0; r < rows; r += ROWS)
            spread_part(w + r * p->in, p->in, rows - r < ROWS ? rows - r : ROWS, k, part,
                        (const float(*)[GROUP])((float *)(error[r / GROUP] + noted) + r % GROUP), last - first, panel);
    }
}

/* All columns [first, last) of up to GROUPS groups of rows; what is packed serves all of them. */
static void tile(const problem *p, float *w, uint8_t *keep, int64_t rows, int64_t first, int64_t last)
{
    column error[GROUPS][LAZY];
    float inner[STEP][STEP];
    int64_t width = p->m ? STEP / p->m * p->m : STEP, lazy = LAZY / width * width;
    for (int64_t begin = first; begin < last; begin += lazy) {
        int64_t done = begin + lazy < last ? begin + lazy : last;
        for (int64_t start = begin; start < done; start += width) {
            int64_t end = start + width < done ? start + width : done;
            for (int64_t j = start; j < end; j++)
                memcpy(inner[j - start], p->u + j * p->in + start, (size_t)(end - start) * sizeof(float));
            for (int64_t r = 0; r < rows; r += GROUP)
                step(p, w + r * p->in, keep + r * p->in, rows - r < GROUP ? rows - r : GROUP, start, end, inner,
                     error[r / GROUP] + (start - begin));
            behind(p, w, rows, start, end, end, done, error, start - begin);
        }
        behind(p, w, rows, begin, done, done, p->in, error, 0);
    }
}

/* w and keep are updated in place. m > 0: write keep, N:M with first a multiple of m, where it is 1, and leave whole the
 * groups where it is 0; m = 0: obey keep as given.
 * d [in] is the diagonal of u; live [in] is 0 for inputs that never fired. */
void second_order_sweep(float *w, uint8_t *keep, const float *u, const float *d, const uint8_t *live, int64_t rows,
                        int64_t in, int64_t first, int64_t last, int64_t n, int64_t m, int threads)
{
    problem p = {u, d, live, in, n, m};
    int64_t groups = rows / (4 * threads * GROUP), high; /* of a tile: every thread shall have some */
    groups = groups < 1 ? 1 : groups > GROUPS ? GROUPS : groups;
    high = groups * GROUP;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t r = 0; r < rows; r += high)
        tile(&p, w + r * in, keep + r * in, rows - r < high ? rows - r : high, first, last);
}

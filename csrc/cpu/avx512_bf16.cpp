// Products of bf16 into fp32 by vdpbf16ps, for processors that have it and no AMX: MKL's run at its fp32 speed there
// (benchmarks/results/products_cpu.md).
//
// Logits a w^T: a thread takes a block of V, packs it so that 32 columns of out read two vectors per pair of k, and
// passes all rows of a over it. dW += a^T w: a thread takes a block of V again, which are rows of out here, and packs
// pairs of rows of both sides.
//
// An element is summed in fp32 in ascending order of k, each block of k from 0, whatever the position and the threads.
// Blocks of k are 256 long for accuracy: one long fp32 sum rounds more often at its full size. Several blocks are added
// before anything is written: with a read and write of out for each, rows 192 KiB apart (V = 49,152) meet in a few sets
// of the caches.
// vdpbf16ps takes operands, products and sums below 2^-126 in magnitude as 0, whatever MXCSR says.
#ifdef __x86_64__
#if !defined(__AVX512BW__) || !defined(__AVX512BF16__)
#error "compile with -mavx512bw -mavx512bf16: see setup.py"
#endif
#include <string.h>

#include "pairs.h"
#include "passes.h"

namespace {

constexpr int ROWS = 12;     // of a at a time: 24 sums, two vectors of w and one of a in 32 registers
constexpr int COLUMNS = 32;  // of out: two vectors
constexpr int TILES = 4;     // a block of V: 128 rows of w
constexpr int PAIRS = 128;   // of k: a block of the sum

// A pair of bf16, neighbours in k, is one uint32_t; this is one k of COLUMNS rows or columns of w.
typedef uint32_t Pairs[COLUMNS];

// `rows` rows of w from (v, k) on, at most COLUMNS, `depth` numbers of each; 0 past either end, up to 16 pairs.
void pack_rows(const Product& p, int64_t v, int64_t k, int64_t rows, int64_t depth, Pairs* to) {
    const uint16_t* from = (const uint16_t*)p.w + v * p.w_stride + k;
    for (int64_t i = 0; i < COLUMNS; i += 16) {
        for (int64_t j = 0; j < depth; j += 32) {
            __m512i r[16];
            for (int l = 0; l < 16; l++) {
                const __mmask32 mask = i + l < rows ? first(depth - j) : 0u;
                r[l] = _mm512_maskz_loadu_epi16(mask, from + (i + l) * p.w_stride + j);
            }
            transpose<COLUMNS>(r, &to[j / 2][i]);
        }
    }
}

// N rows of out and `columns` of COLUMNS columns, written, or added to what is there. Row i of a has its pair k at
// a[i * ROW_STEP + k * PAIR_STEP].
template <int ROW_STEP, int PAIR_STEP, int N>
void tile(const uint32_t* a, const Pairs* w, int64_t pairs, float* out, int64_t stride, int64_t columns, bool adds) {
    const __mmask32 mask = first(columns);
    const __mmask16 low = (__mmask16)mask, high = (__mmask16)(mask >> 16);
    __m512 sum[N][2], total[N][2];
    int64_t k = 0;
    do {  // once at least: an empty sum is 0
        const int64_t stop = at_most(k + PAIRS, pairs);
        const bool begins = k == 0;
#pragma GCC unroll 12
        for (int i = 0; i < N; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
        for (; k < stop; k++) {
            const __m512bh w0 = (__m512bh)_mm512_load_si512(w[k]), w1 = (__m512bh)_mm512_load_si512(w[k] + 16);
#pragma GCC unroll 12
            for (int i = 0; i < N; i++) {
                const __m512bh ai = (__m512bh)_mm512_set1_epi32((int)a[i * ROW_STEP + k * PAIR_STEP]);
                sum[i][0] = _mm512_dpbf16_ps(sum[i][0], ai, w0);
                sum[i][1] = _mm512_dpbf16_ps(sum[i][1], ai, w1);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < N; i++) {
            total[i][0] = begins ? sum[i][0] : _mm512_add_ps(sum[i][0], total[i][0]);
            total[i][1] = begins ? sum[i][1] : _mm512_add_ps(sum[i][1], total[i][1]);
        }
    } while (k < pairs);
#pragma GCC unroll 12
    for (int i = 0; i < N; i++) {
        float* to = out + i * stride;
        if (adds) {
            total[i][0] = _mm512_add_ps(total[i][0], _mm512_maskz_loadu_ps(low, to));
            total[i][1] = _mm512_add_ps(total[i][1], _mm512_maskz_loadu_ps(high, to + 16));
        }
        if (columns >= COLUMNS) {  // a masked store is slow on Zen 4 though nothing be masked
            _mm512_storeu_ps(to, total[i][0]);
            _mm512_storeu_ps(to + 16, total[i][1]);
        } else {
            _mm512_mask_storeu_ps(to, low, total[i][0]);
            _mm512_mask_storeu_ps(to + 16, high, total[i][1]);
        }
    }
}

typedef void (*Tile)(const uint32_t*, const Pairs*, int64_t, float*, int64_t, int64_t, bool);

// The tile of `rows` rows.
template <int ROW_STEP, int PAIR_STEP, int N = ROWS>
inline Tile tile_of(int64_t rows) {
    if constexpr (N == 1) {
        return tile<ROW_STEP, PAIR_STEP, 1>;
    } else {
        return rows == N ? tile<ROW_STEP, PAIR_STEP, N> : tile_of<ROW_STEP, PAIR_STEP, N - 1>(rows);
    }
}

}  // namespace

const int64_t hsd_project_out_block = TILES * COLUMNS;

void hsd_project_out_block_of(const Product& p, int64_t block) {
    constexpr int64_t DEPTH = 4 * PAIRS;  // pairs of k at a time: 256 KiB of w, in L2; 24 KiB of a, in L1
    constexpr int64_t ROW = DEPTH + 16;   // rows of a on lines of different sets
    alignas(64) Pairs w[TILES][DEPTH];
    uint32_t a[ROWS * ROW];
    const int64_t v = block * hsd_project_out_block, columns = at_most(hsd_project_out_block, p.vocab - v);
    int64_t k = 0;
    do {
        const int64_t depth = at_most(2 * DEPTH, p.dim - k), pairs = (depth + 1) / 2;
        for (int t = 0; t * COLUMNS < columns; t++)
            pack_rows(p, v + t * COLUMNS, k, at_most(COLUMNS, columns - t * COLUMNS), depth, w[t]);
        for (int64_t row = 0; row < p.rows; row += ROWS) {
            const int64_t rows = at_most(ROWS, p.rows - row);
            for (int64_t i = 0; i < rows; i++) {
                if (depth > 0) a[i * ROW + pairs - 1] = 0;  // for the half of it that an odd depth leaves
                memcpy(a + i * ROW, (const uint16_t*)p.a + (row + i) * p.a_stride + k, (size_t)depth * 2);
            }
            const Tile tile = tile_of<ROW, 1>(rows);
            float* out = p.out + row * p.out_stride + v;
            for (int t = 0; t * COLUMNS < columns; t++)
                tile(a, w[t], pairs, out + t * COLUMNS, p.out_stride, columns - t * COLUMNS, k > 0);
        }
        k += 2 * DEPTH;
    } while (k < p.dim);
}

constexpr int64_t BANDS = 16;  // of ROWS rows of out

const int64_t hsd_accumulate_block = BANDS * ROWS;

void hsd_accumulate_block_of(const Product& p, int64_t block) {
    constexpr int64_t DEPTH = 2 * PAIRS;        // pairs of k at a time: 192 KiB of a and 128 KiB of w, in L2
    constexpr int64_t BAND = DEPTH * ROWS + 4;  // 16 numbers are stored where 12 count
    alignas(64) Pairs w[TILES][DEPTH];
    alignas(64) uint32_t line[BANDS * ROWS + 16];
    uint32_t a[BANDS * BAND];  // band, pair, row
    const int64_t v = block * hsd_accumulate_block, rows = at_most(hsd_accumulate_block, p.vocab - v);
    int64_t k = 0;
    do {
        const int64_t depth = at_most(2 * DEPTH, p.rows - k), pairs = (depth + 1) / 2;
        for (int64_t j = 0; j < pairs; j++) {
            const uint16_t* row = (const uint16_t*)p.a + (k + 2 * j) * p.a_stride + v;
            const bool both = 2 * j + 1 < depth;
            for (int64_t i = 0; i < rows; i += 32) pair<16>(row + i, p.a_stride, both, first(rows - i), line + i);
            for (int64_t i = 0; i * ROWS < rows; i++)
                _mm512_storeu_si512(a + i * BAND + j * ROWS, _mm512_loadu_si512(line + i * ROWS));
        }
        for (int64_t d = 0; d < p.dim; d += TILES * COLUMNS) {
            const int64_t columns = at_most(TILES * COLUMNS, p.dim - d);
            for (int64_t j = 0; j < pairs; j++) {
                const uint16_t* row = (const uint16_t*)p.w + (k + 2 * j) * p.w_stride + d;
                const bool both = 2 * j + 1 < depth;
                for (int t = 0; t * COLUMNS < columns; t++)
                    pair<16>(row + t * COLUMNS, p.w_stride, both, first(columns - t * COLUMNS), w[t][j]);
            }
            for (int64_t i = 0; i * ROWS < rows; i++) {
                const Tile tile = tile_of<1, ROWS>(at_most(ROWS, rows - i * ROWS));
                float* out = p.out + (v + i * ROWS) * p.out_stride + d;
                const bool adds = k > 0 || p.adds;
                for (int t = 0; t * COLUMNS < columns; t++)
                    tile(a + i * BAND, w[t], pairs, out + t * COLUMNS, p.out_stride, columns - t * COLUMNS, adds);
            }
        }
        k += 2 * DEPTH;
    } while (k < p.rows);
}
#endif

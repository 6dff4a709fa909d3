// Products of bf16 into fp32 on AMX tiles: MKL's are slower (benchmarks/results/products_cpu_amx.md), torch's round
// their results to bf16.
//
// A tile is 16 rows of 16 pairs of k, 1 KiB; a block is 32 rows and 32 columns of out, four tiles of sums. Both sides
// are packed tile by tile, (step of 16 pairs, half of the block), with zeros beyond their ends: the side that every
// thread reads once per call, the other one block by block.
//
// An element is summed in fp32 in ascending order of k, 512 of k from 0 and then those sums, whatever the position and
// the threads. Tiles take operands and results below 2^-126 in magnitude as 0.
#ifdef __x86_64__
#if !defined(__AVX512BW__) || !defined(__AMX_BF16__)
#error "compile with -mavx512bw -mamx-tile -mamx-bf16: see setup.py"
#endif
#include <sys/syscall.h>
#include <unistd.h>

#include "pairs.h"
#include "passes.h"

namespace {

constexpr int SIDE = 32;         // rows and columns of a block of out
constexpr int TILE = 16 * 16;    // pairs
constexpr int STEP = 2 * TILE;   // of one side of a block, 32 of k
constexpr int SUM = 16;          // steps of one sum
constexpr int DEPTH = 32;        // steps that are packed at a time
constexpr int BLOCKS = 4;        // of 32 rows of the vocabulary

inline int64_t steps_of(int64_t k) { return (k + 31) / 32; }

inline int64_t blocks_of(int64_t n) { return (n + SIDE - 1) / SIDE; }

// The tiles of this thread while it lives. What oneDNN has configured is as it was afterwards.
class Configured {
    struct alignas(64) Config {
        uint8_t palette = 0, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } before;

  public:
    Configured() {
        _tile_storeconfig(&before);
        Config ours;
        ours.palette = 1;
        for (int i = 0; i < 8; i++) ours.row_bytes[i] = 64, ours.rows[i] = 16;
        _tile_loadconfig(&ours);
    }
    ~Configured() {
        if (before.palette == 0)
            _tile_release();
        else
            _tile_loadconfig(&before);
    }
};

// Rows of `from`, at most 32, `depth` numbers of each.
void pack_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t depth, uint32_t* to) {
    for (int64_t k = 0; k < depth; k += 32, to += STEP) {
        for (int64_t i = 0; i < SIDE; i++) {
            const __mmask32 mask = i < rows ? first(depth - k) : 0u;
            _mm512_store_si512(to + 16 * i, _mm512_maskz_loadu_epi16(mask, from + i * stride + k));
        }
    }
}

// The same as columns: 16 pairs of 16 rows a tile.
void pack_rows_as_columns(const uint16_t* from, int64_t stride, int64_t rows, int64_t depth, uint32_t* to) {
    for (int64_t k = 0; k < depth; k += 32, to += STEP) {
        for (int64_t half = 0; half < 2; half++) {
            __m512i r[16];
            for (int64_t l = 0; l < 16; l++) {
                const int64_t i = 16 * half + l;
                r[l] = _mm512_maskz_loadu_epi16(i < rows ? first(depth - k) : 0u, from + i * stride + k);
            }
            transpose<16>(r, to + half * TILE);
        }
    }
}

// Columns of `from`, at most 32, `depth` rows of it: k goes down.
void pack_columns(const uint16_t* from, int64_t stride, int64_t columns, int64_t depth, uint32_t* to) {
    const __mmask32 mask = first(columns);
    for (int64_t k = 0; k < depth; k += 32, to += STEP)
        for (int64_t j = 0; j < 16; j++) {
            const int64_t at = k + 2 * j;
            pair<TILE>(from + at * stride, stride, at + 1 < depth, at < depth ? mask : 0u, to + 16 * j);
        }
}

// The same as rows: 16 columns of 16 pairs a tile.
void pack_columns_as_rows(const uint16_t* from, int64_t stride, int64_t columns, int64_t depth, uint32_t* to) {
    alignas(64) uint32_t step[STEP];
    for (int64_t k = 0; k < depth; k += 32, to += STEP) {
        pack_columns(from + k * stride, stride, columns, at_most(32, depth - k), step);
        for (int64_t half = 0; half < 2; half++) {
            __m512i r[16];
            for (int64_t l = 0; l < 16; l++) r[l] = _mm512_load_si512(step + half * TILE + 16 * l);
            transpose<16>(r, to + half * TILE);
        }
    }
}

// A block of out, `rows` by `columns` of it, written, or added to what is there.
void block(const uint32_t* a, const uint32_t* w, int64_t steps, float* out, int64_t stride, int64_t rows,
           int64_t columns, bool adds) {
    alignas(64) float sum[SIDE * SIDE], next[SIDE * SIDE];
    int64_t s = 0;
    do {  // once at least: an empty sum is 0
        const int64_t stop = at_most(s + SUM, steps);
        float* to = s == 0 ? sum : next;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (; s < stop; s++) {
            _tile_loadd(4, a + s * STEP, 64);
            _tile_loadd(6, w + s * STEP, 64);
            _tile_loadd(5, a + s * STEP + TILE, 64);
            _tile_loadd(7, w + s * STEP + TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (stop == steps && to == sum && !adds && rows >= SIDE && columns >= SIDE) {
            _tile_stored(0, out, stride * 4);
            _tile_stored(1, out + 16, stride * 4);
            _tile_stored(2, out + 16 * stride, stride * 4);
            _tile_stored(3, out + 16 * stride + 16, stride * 4);
            return;
        }
        _tile_stored(0, to, 4 * SIDE);
        _tile_stored(1, to + 16, 4 * SIDE);
        _tile_stored(2, to + 16 * SIDE, 4 * SIDE);
        _tile_stored(3, to + 16 * SIDE + 16, 4 * SIDE);
        if (to == next)
            for (int i = 0; i < SIDE * SIDE; i++) sum[i] += next[i];
    } while (s < steps);
    const __mmask32 mask = first(columns);
    for (int64_t i = 0; i < at_most(rows, SIDE); i++) {
        for (int half = 0; half < 2; half++) {
            const __mmask16 part = (__mmask16)(mask >> (16 * half));
            float* at = out + i * stride + 16 * half;
            __m512 value = _mm512_load_ps(sum + i * SIDE + 16 * half);
            if (adds) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(part, at));
            _mm512_mask_storeu_ps(at, part, value);
        }
    }
}

}  // namespace

bool hsd_has_tiles() {
    // Linux gives a process the tiles when it asks for them: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("amx-tile") &&
           __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

int64_t hsd_tiles_of(int64_t n, int64_t k) { return blocks_of(n) * steps_of(k) * STEP; }

// logits: a as rows. dW: w, whose rows are k, as columns.
void hsd_tiles_pack(const Product& p, Sum sum, int64_t part, uint32_t* to) {
    const int64_t at = part * SIDE;
    if (sum == LOGITS)
        pack_rows((const uint16_t*)p.a + at * p.a_stride, p.a_stride, p.rows - at, p.dim,
                  to + part * steps_of(p.dim) * STEP);
    else
        pack_columns((const uint16_t*)p.w + at, p.w_stride, p.dim - at, p.rows, to + part * steps_of(p.rows) * STEP);
}

const int64_t hsd_tiles_block = BLOCKS * SIDE;

void hsd_tiles_project_out(const Product& p, const uint32_t* a, int64_t number) {
    const Configured tiles;
    alignas(64) uint32_t w[BLOCKS][DEPTH * STEP];
    const int64_t v = number * hsd_tiles_block, columns = at_most(hsd_tiles_block, p.vocab - v), all = steps_of(p.dim);
    int64_t s = 0;
    do {
        const int64_t steps = at_most(DEPTH, all - s), k = s * 32, depth = at_most(32 * DEPTH, p.dim - k);
        for (int64_t t = 0; t * SIDE < columns; t++)
            pack_rows_as_columns((const uint16_t*)p.w + (v + t * SIDE) * p.w_stride + k, p.w_stride, columns - t * SIDE,
                                 depth, w[t]);
        for (int64_t row = 0; row < p.rows; row += SIDE)
            for (int64_t t = 0; t * SIDE < columns; t++)
                block(a + (row / SIDE * all + s) * STEP, w[t], steps, p.out + row * p.out_stride + v + t * SIDE,
                      p.out_stride, p.rows - row, columns - t * SIDE, s > 0);
        s += DEPTH;
    } while (s < all);
}

void hsd_tiles_accumulate(const Product& p, const uint32_t* w, int64_t number) {
    const Configured tiles;
    alignas(64) uint32_t a[BLOCKS][DEPTH * STEP];
    const int64_t v = number * hsd_tiles_block, rows = at_most(hsd_tiles_block, p.vocab - v), all = steps_of(p.rows);
    int64_t s = 0;
    do {
        const int64_t steps = at_most(DEPTH, all - s), k = s * 32, depth = at_most(32 * DEPTH, p.rows - k);
        for (int64_t t = 0; t * SIDE < rows; t++)
            pack_columns_as_rows((const uint16_t*)p.a + k * p.a_stride + v + t * SIDE, p.a_stride, rows - t * SIDE,
                                 depth, a[t]);
        for (int64_t d = 0; d < p.dim; d += SIDE)
            for (int64_t t = 0; t * SIDE < rows; t++)
                block(a[t], w + (d / SIDE * all + s) * STEP, steps, p.out + (v + t * SIDE) * p.out_stride + d,
                      p.out_stride, rows - t * SIDE, p.dim - d, s > 0 || p.adds);
        s += DEPTH;
    } while (s < all);
}
#endif

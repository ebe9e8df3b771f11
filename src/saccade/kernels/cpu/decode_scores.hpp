// Scores of few queries and all stored keys, for whoever needs weights and not only what they add up to.
#pragma once
#include "decode.hpp"

namespace saccade::SACCADE_ISA {

constexpr int SCORE_ROWS = LANES < 4 ? LANES : 4;  // queries of a register block
constexpr int SCORE_KEYS = LANES / SCORE_ROWS;     // and keys
constexpr int SCORE_TILE = 64;                     // keys whose scores are taken before they are written out

INLINE bool scores_in_pairs(const Decode& p) {
  return HAS_BF16_DOT && p.a.storage == BF16 && p.kv_storage == BF16 && p.a.dim % (2 * LANES) == 0;
}

// out[r][j] = scale * queries[r] . keys[j]; rows of `steps` vectors.
template <class Op>
static void score_tile(const typename Op::element* const* keys, int count, const typename Op::element* queries, int64_t rows,
                       int64_t steps, float scale, float* out) {
  for (int j = 0; j < count; j += SCORE_KEYS) {
    const typename Op::element* key[SCORE_KEYS];
    for (int i = 0; i < SCORE_KEYS; ++i) key[i] = keys[j + i < count ? j + i : count - 1];
    for (int64_t r = 0; r < rows; r += SCORE_ROWS) {
      const typename Op::element* query = queries + r * steps * LANES;
      vf acc[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) acc[i] = vf{};
      for (int64_t s = 0; s < steps; ++s) {
        typename Op::vector x[SCORE_KEYS];
#pragma GCC unroll 16
        for (int i = 0; i < SCORE_KEYS; ++i) x[i] = Op::take(key[i] + s * LANES);
#pragma GCC unroll 4
        for (int n = 0; n < SCORE_ROWS; ++n) {
          typename Op::vector y = Op::take(query + (n * steps + s) * LANES);
#pragma GCC unroll 16
          for (int i = 0; i < SCORE_KEYS; ++i) acc[n * SCORE_KEYS + i] = Op::multiply(acc[n * SCORE_KEYS + i], x[i], y);
        }
      }
      float sums[LANES];
      store(sums, sums_of(acc) * scale);
#pragma GCC unroll 4
      for (int n = 0; n < SCORE_ROWS; ++n)
        __builtin_memcpy(out + (r + n) * SCORE_TILE + j, sums + n * SCORE_KEYS, SCORE_KEYS * sizeof(float));
    }
  }
}

// One head's queries against its keys start .. end - 1.
template <class Op>
class Scorer {
 public:
  // Bytes, and where its parts lie if there is memory.
  int64_t lay_out(const Decode& p, char* memory) {
    rows = p.a.heads / p.a.kv_heads * p.a.queries;
    steps = (p.a.dim + LANES * Op::PER_ELEMENT - 1) / (LANES * Op::PER_ELEMENT);
    const int64_t padded_rows = round_up(rows, SCORE_ROWS);
    int64_t bytes = 0;
    auto part = [&](int64_t count) {
      char* at = memory + bytes;
      bytes += round_up(count * 4, 64);
      return at;
    };
    queries = reinterpret_cast<typename Op::element*>(part(padded_rows * steps * LANES));
    tile = reinterpret_cast<float*>(part(padded_rows * SCORE_TILE));
    wide = reinterpret_cast<float*>(part(SCORE_TILE * steps * LANES));
    return bytes;
  }

  void run(const Decode& p, char* memory, int64_t b, int64_t g, int64_t start, int64_t end) {
    lay_out(p, memory);
    take_queries(p, b, g);
    const int64_t length = p.lengths ? p.lengths[b * p.a.kv_heads + g] : p.a.keys;
    for (int64_t at = start; at < end; at += SCORE_TILE) {
      const int64_t stop = at + SCORE_TILE < end ? at + SCORE_TILE : end;
      const int count = int((stop < length ? stop : length) - at);
      if (count > 0) score(p, b, g, at, count);
      for (int64_t r = 0; r < rows; ++r) write(p, b, g, r, at, stop, length);
    }
  }

 private:
  int64_t rows, steps;
  typename Op::element* queries;
  float *tile, *wide;

  void take_queries(const Decode& p, int64_t b, int64_t g) {
    const int64_t share = p.a.heads / p.a.kv_heads, width = steps * LANES;
    for (int64_t r = 0; r < round_up(rows, SCORE_ROWS); ++r) {
      typename Op::element* into = queries + r * width;
      for (int64_t d = 0; d < width; ++d) into[d] = 0;
      if (r >= rows) continue;
      const char* row = row_of(p.a.q, b, g * share + r / p.a.queries, r % p.a.queries, p.a.storage);
      if constexpr (Op::PER_ELEMENT == 2)
        __builtin_memcpy(into, row, size_t(p.a.dim) * 2);
      else if (p.a.storage == FP32)
        __builtin_memcpy(into, row, size_t(p.a.dim) * 4);
      else
        widen_row(row, p.a.dim, p.a.storage, reinterpret_cast<float*>(into));
    }
  }

  void score(const Decode& p, int64_t b, int64_t g, int64_t at, int count) {
    const typename Op::element* keys[SCORE_TILE];
    const int64_t bytes = p.kv_storage == FP32 ? 4 : p.kv_storage == INT8 || p.kv_storage == INT4 ? 1 : 2;
    const bool in_place = Op::PER_ELEMENT == 2 || (p.kv_storage == FP32 && p.a.dim % LANES == 0);
    for (int j = 0; j < count; ++j) {
      const int64_t slot = at + j, entry = slot / p.page_size, row = slot % p.page_size;
      const int64_t page = p.table[b * p.table_stride[0] + g * p.table_stride[1] + entry];
      const char* key = static_cast<const char*>(p.a.k.data) + (page * p.a.k.batch_stride + row * p.a.k.row_stride) * bytes;
      keys[j] = reinterpret_cast<const typename Op::element*>(key);
      if constexpr (Op::PER_ELEMENT == 1) {
        if (in_place) continue;
        const int64_t scales = page * p.k_scales.page_stride + row * p.k_scales.row_stride;
        float* into = wide + j * steps * LANES;
        widen_row_of(key, p.a.dim, p.kv_storage, p.k_scales.scale ? p.k_scales.scale + scales : nullptr,
                     p.k_scales.zero ? p.k_scales.zero + scales : nullptr, p.k_scales.group, steps * LANES, into);
        keys[j] = into;
      }
    }
    score_tile<Op>(keys, count, queries, rows, steps, p.a.scale, tile);
  }

  // Scores of a row, -inf where it does not see: beyond what the head holds, and beyond the query's own place.
  void write(const Decode& p, int64_t b, int64_t g, int64_t r, int64_t at, int64_t stop, int64_t length) {
    const int64_t head = g * (p.a.heads / p.a.kv_heads) + r / p.a.queries, query = r % p.a.queries;
    const int64_t seen = query + length - p.a.queries + 1 - at;
    float* out = p.a.out + ((b * p.a.heads + head) * p.a.queries + query) * p.a.keys + at;
    const float* row = tile + r * SCORE_TILE;
    for (int64_t j = 0; j < stop - at; ++j) out[j] = j < seen ? row[j] : -INF;
  }
};

static int64_t score_scratch(const Decode& p) {
  return scores_in_pairs(p) ? Scorer<HalfPairs>().lay_out(p, nullptr) : Scorer<Floats>().lay_out(p, nullptr);
}

static void decode_scores(const Decode& p, char* memory, int64_t b, int64_t g, int64_t start, int64_t end) {
  if (scores_in_pairs(p))
    Scorer<HalfPairs>().run(p, memory, b, g, start, end);
  else
    Scorer<Floats>().run(p, memory, b, g, start, end);
}

}  // namespace saccade::SACCADE_ISA

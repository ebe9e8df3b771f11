// A best-first search in a graph of keys. One query head is a unit of work: rounds follow each other, heads do not.
//
// The walk from key to key is bound by latency, as rows lie anywhere: a round knows all rows it will read before it reads the
// first, and asks for them some ahead.
#pragma once
#include "decode_scores.hpp"
#include "gather.hpp"
#include "problem_search.hpp"

namespace saccade::SACCADE_ISA {

struct Seen {
  float score;
  int32_t slot : 31;
  uint32_t open : 1;  // its neighbours were not looked at
};

// A number that rises as the score falls.
INLINE uint32_t rank_of(const Seen& x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x.score, 4);
  return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

// By falling score, digit by digit from the lowest, as comparisons of scores cannot be foretold; `other` has as much room. Where
// they are: in `x` or in `other`.
static Seen* sort_falling(Seen* x, Seen* other, int64_t count) {
  constexpr int DIGITS = 4, VALUES = 256;
  int32_t begins[DIGITS][VALUES] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int d = 0; d < DIGITS; ++d) ++begins[d][rank_of(x[i]) >> 8 * d & (VALUES - 1)];
  for (int d = 0; d < DIGITS; ++d) {
    int32_t *begin = begins[d], sum = 0;
    if (begin[rank_of(x[0]) >> 8 * d & (VALUES - 1)] == count) continue;  // all have this digit
    for (int value = 0; value < VALUES; ++value) {
      const int32_t here = begin[value];
      begin[value] = sum;
      sum += here;
    }
    for (int64_t i = 0; i < count; ++i) other[begin[rank_of(x[i]) >> 8 * d & (VALUES - 1)]++] = x[i];
    Seen* sorted = other;
    other = x;
    x = sorted;
  }
  return x;
}

class Searcher {
 public:
  // Bytes, and where its parts lie if there is memory.
  int64_t lay_out(const Search& p, char* memory) {
    const Graph& graph = p.graph;
    const int64_t chosen = p.expand < p.width ? p.expand : p.width;
    int64_t most = chosen * graph.each * graph.degree;
    most = most > graph.first ? most : graph.first;
    most = most < graph.keys ? most : graph.keys;
    stride = round_up(p.cache.a.dim, LANES);
    int64_t bytes = 0;
    auto part = [&](int64_t size) {
      char* at = memory + bytes;
      bytes += round_up(size, 64);
      return at;
    };
    query = reinterpret_cast<float*>(part(stride * 4));
    wide = reinterpret_cast<float*>(part(LANES * stride * 4));
    known = reinterpret_cast<uint64_t*>(part((graph.keys + 63) / 64 * 8));
    kept = reinterpret_cast<Seen*>(part(p.width * int64_t(sizeof(Seen))));
    merged = reinterpret_cast<Seen*>(part(p.width * int64_t(sizeof(Seen))));
    fresh = reinterpret_cast<Seen*>(part((most + 1) * int64_t(sizeof(Seen))));
    sorting = reinterpret_cast<Seen*>(part(most * int64_t(sizeof(Seen))));
    asked = reinterpret_cast<const int32_t**>(part(chosen * graph.each * int64_t(sizeof(int32_t*))));
    return bytes;
  }

  void run(const Search& p, char* memory, int64_t b, int64_t h) {
    lay_out(p, memory);
    const Decode& cache = p.cache;
    const int64_t g = h / (cache.a.heads / cache.a.kv_heads), group = b * cache.a.kv_heads + g;
    const float* row = reinterpret_cast<const float*>(row_of(cache.a.q, b, h, 0, FP32));
    for (int64_t d = 0; d < stride; ++d) query[d] = d < cache.a.dim ? row[d] : 0.0f;
    for (int64_t i = 0; i < (p.graph.keys + 63) / 64; ++i) known[i] = 0;
    table = cache.table + b * cache.table_stride[0] + g * cache.table_stride[1];
    const int64_t length = cache.lengths[group];
    limit = uint32_t(length < p.graph.keys ? length : p.graph.keys);
    have = keys_read = numbers_read = coming = 0;
    meet(p.graph.entries + group * p.graph.first, p.graph.first);
    do {
      score(cache);
      take(p.width);
    } while (follow(p, group));
    int64_t* found = p.found + (b * cache.a.heads + h) * p.width;
    for (int64_t i = 0; i < p.width; ++i) found[i] = i < have ? kept[i].slot : -1;
    p.looked[(b * cache.a.heads + h) * 2] = keys_read;
    p.looked[(b * cache.a.heads + h) * 2 + 1] = numbers_read;
  }

 private:
  int64_t stride, have, coming;  // keys that are kept, and that are new in this round
  int64_t keys_read, numbers_read;
  uint32_t limit;  // what is below names a key
  float *query, *wide;
  uint64_t* known;  // a bit of each key: whether it was met
  Seen *kept, *merged, *fresh, *sorting;
  const int32_t** asked;
  const int64_t* table;

  // Keys, of which those that were not met before are new; how many there are. Without branches, as none could be foretold.
  int64_t meet(const int32_t* keys, int64_t count) {
    int64_t real = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool is_key = uint32_t(keys[i]) < limit;
      const int32_t key = is_key ? keys[i] : 0;
      const uint64_t word = known[key >> 6], bit = uint64_t(is_key) << (key & 63);
      known[key >> 6] = word | bit;
      fresh[coming].slot = key;
      fresh[coming].open = 1;
      coming += (word & bit) != bit;
      real += is_key;
    }
    return real;
  }

  // The scores of what is new, some rows at a time while those after them come.
  void score(const Decode& p) {
    keys_read += coming;
    switch (p.kv_storage) {
      case FP32: return score_stored<FP32>(p);
      case BF16: return score_stored<BF16>(p);
      case FP16: return score_stored<FP16>(p);
      case INT8: return score_stored<INT8>(p);
      default: return score_stored<INT4>(p);
    }
  }

  template <int32_t STORAGE>
  void score_stored(const Decode& p) {
    constexpr bool CODES = STORAGE == INT8 || STORAGE == INT4;
    constexpr int BYTES = STORAGE == FP32 ? 4 : CODES ? 1 : 2;
    const bool in_place = !CODES && p.a.dim % LANES == 0;
    const int64_t bytes = row_bytes(p.a.dim, STORAGE);
    const char *rows[LANES], *next[LANES] = {};
    find(p, 0, BYTES, bytes, next);
    for (int64_t j = 0; j < coming; j += LANES) {
      for (int i = 0; i < LANES; ++i) rows[i] = next[i];
      if (j + LANES < coming) find(p, j + LANES, BYTES, bytes, next);
      vf acc[LANES];
      if (!in_place) {
        for (int i = 0; i < LANES; ++i) widen(p, j + i, rows[i], wide + i * stride);
        dots([&](int i, int64_t d) { return load(wide + i * stride + d); }, acc);
      } else if constexpr (!CODES) {
        dots([&](int i, int64_t d) { return take_row<STORAGE>(rows[i], d); }, acc);
      }
      float sums[LANES];
      store(sums, sums_of(acc));
      for (int i = 0; i < LANES && j + i < coming; ++i) fresh[j + i].score = sums[i];
    }
  }

  template <class Row>
  inline __attribute__((always_inline)) void dots(const Row& row, vf* acc) const {
    for (int i = 0; i < LANES; ++i) acc[i] = vf{};
    for (int64_t d = 0; d < stride; d += LANES) {
      const vf x = load(query + d);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) acc[i] += row(i, d) * x;
    }
  }

  // Page and row of what is new at j; past the end, of the last.
  void place(const Decode& p, int64_t j, int64_t* page, int64_t* row) const {
    const int64_t slot = fresh[j < coming ? j : coming - 1].slot;
    *page = table[slot / p.page_size];
    *row = slot % p.page_size;
  }

  // Where the rows j .. j + LANES - 1 of what is new lie; asks for them.
  void find(const Decode& p, int64_t j, int64_t element, int64_t bytes, const char** rows) const {
    for (int i = 0; i < LANES && coming; ++i) {
      int64_t page, row;
      place(p, j + i, &page, &row);
      rows[i] = static_cast<const char*>(p.a.k.data) + (page * p.a.k.batch_stride + row * p.a.k.row_stride) * element;
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(rows[i] + at, 0, 2);
    }
  }

  void widen(const Decode& p, int64_t j, const char* from, float* into) const {
    int64_t page, row;
    place(p, j, &page, &row);
    const int64_t scales = page * p.k_scales.page_stride + row * p.k_scales.row_stride;
    widen_row_of(from, p.a.dim, p.kv_storage, p.k_scales.scale ? p.k_scales.scale + scales : nullptr,
                 p.k_scales.zero ? p.k_scales.zero + scales : nullptr, p.k_scales.group, stride, into);
  }

  // The best `width` of what is kept and what is new are kept, in order.
  void take(int64_t width) {
    const float least = have == width ? kept[width - 1].score : -INF;
    int64_t count = 0;
    for (int64_t j = 0; j < coming; ++j) {
      fresh[count] = fresh[j];
      count += have < width || fresh[j].score > least;
    }
    coming = 0;
    if (!count) return;
    const Seen* better = sort_falling(fresh, sorting, count);
    int64_t i = 0, j = 0, n = 0;
    for (; n < width && i < have && j < count; ++n) {
      const bool old = !(kept[i].score < better[j].score);
      merged[n] = old ? kept[i] : better[j];
      i += old;
      j += !old;
    }
    for (; n < width && i < have; ++n) merged[n] = kept[i++];
    for (; n < width && j < count; ++n) merged[n] = better[j++];
    have = n;
    Seen* other = kept;
    kept = merged;
    merged = other;
  }

  // Meets the neighbours of the best keys whose neighbours were not looked at; false if there are none.
  bool follow(const Search& p, int64_t group) {
    const Graph& graph = p.graph;
    const int32_t *links = graph.links + group * graph.keys * graph.each, *lists = graph.lists + group * graph.queries * graph.degree;
    int64_t chosen = 0, queries = 0;
    for (int64_t i = 0; i < have && chosen < p.expand; ++i) {
      if (!kept[i].open) continue;
      __builtin_prefetch(links + kept[i].slot * graph.each);
      merged[chosen++] = kept[i];
      kept[i].open = 0;
    }
    for (int64_t i = 0; i < chosen; ++i)
      for (int64_t n = 0; n < graph.each; ++n) {
        const int32_t number = links[merged[i].slot * graph.each + n];
        if (uint32_t(number) >= uint32_t(graph.queries)) continue;
        asked[queries] = lists + number * graph.degree;
        for (int64_t d = 0; d < graph.degree; d += 16) __builtin_prefetch(asked[queries] + d);
        ++queries;
      }
    numbers_read += queries;
    for (int64_t i = 0; i < queries; ++i) numbers_read += meet(asked[i], graph.degree);
    return chosen > 0;
  }
};

static int64_t search_scratch(const Search& p) { return Searcher().lay_out(p, nullptr); }

static void search(const Search& p, char* memory, int64_t b, int64_t h) { Searcher().run(p, memory, b, h); }

}  // namespace saccade::SACCADE_ISA

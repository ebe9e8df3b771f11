// Best-first searches in graphs of stored keys, as Python hands them over (`saccade.kernels.cpu.search` mirrors it).
#pragma once
#include "problem_decode.hpp"

namespace saccade {

// A graph of queries and keys for each (b, g), contiguous. Numbers of no query and of no stored key stand for none.
struct Graph {
  const int32_t *lists;    // [B, G, queries, degree], keys that a query scores highest
  const int32_t *links;    // [B, G, keys, links], queries that score a key highest
  const int32_t *entries;  // [B, G, first], keys that a search begins with
  int64_t queries, degree, keys, each, first;  // `each`: links of a key
};

// One query for each of B and H, fp32: cache.a.q [B, H, 1, D]; cache.table has the pages of the keys.
struct Search {
  Decode cache;
  Graph graph;
  int64_t width, expand;  // keys that are kept, and whose neighbours are looked at in a round
  int64_t* found;         // [B, H, width], slots by falling score; -1 where there are fewer
  int64_t* looked;        // [B, H, 2], keys whose score was taken, and numbers of the graph that were read
};

}  // namespace saccade

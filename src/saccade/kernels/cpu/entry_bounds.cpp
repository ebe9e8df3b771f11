// One pass over a block layout before its numbers become addresses.
#include <cstdint>

#include "export.hpp"

// What points outside: 0 nothing, 1 indptr, 2 indices, 3 kinds; `place` then says where the first one is.
EXPORT int saccade_layout_outside(const int64_t* indptr, int64_t rows, const int32_t* indices, const int32_t* kinds,
                                  int64_t entries, int64_t key_blocks, int64_t patterns, int64_t* place) {
  *place = 0;
  if (indptr[0] != 0) return 1;
  for (int64_t row = 0; row < rows; ++row)
    if (indptr[row + 1] < indptr[row] || indptr[row + 1] > entries) {
      *place = row + 1;
      return 1;
    }
  bool outside = false;  // without a branch, so that the compiler vectorises the pass
  for (int64_t entry = 0; entry < entries; ++entry)
    outside |= (indices[entry] < 0) | (indices[entry] >= key_blocks) | (kinds[entry] < -1) | (kinds[entry] >= patterns);
  for (int64_t entry = 0; outside && entry < entries; ++entry) {
    *place = entry;
    if (indices[entry] < 0 || indices[entry] >= key_blocks) return 2;
    if (kinds[entry] < -1 || kinds[entry] >= patterns) return 3;
  }
  return 0;
}

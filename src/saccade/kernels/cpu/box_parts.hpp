// How one side of an attention within boxes is cut into parts whose rows lie across the lanes. For entry_boxes.cpp.
#pragma once
#include <algorithm>
#include <vector>

#include "engine.hpp"

namespace saccade {

constexpr int64_t COLUMNS = 128;     // of a part, about, at most: what it sees should stay in the cache
constexpr int64_t PAIRS = 1024;      // of a token, at most, for the same reason
constexpr int64_t PER_THREAD = 3;    // parts that keep the threads evenly busy
constexpr double ROW_OVERHEAD = 12;  // what a tile costs beside its pairs, in pairs

// One side, class by class along every axis.
struct RowSide {
  std::vector<int32_t> first[3], last[3];  // windows, counted within their class
  std::vector<int64_t> classes[3];         // where each class begins, and the end
  std::vector<SheetPart> parts;
  Room room{1, 1, 1, 1};
  double cost = 0;  // of a head, in pairs of a vector of tokens
};

inline int64_t width_of_parts(int64_t size) {
  int64_t parts = (size + COLUMNS - 1) / COLUMNS, lanes = engine->lanes;
  return ((size + parts - 1) / parts + lanes - 1) / lanes * lanes;
}

// What a class of rows costs: one that a group's rows see costs as many pairs as there are, but at least two, for the loads.
inline double measure_rows(const int32_t* first, const int32_t* last, int64_t size, Room* room) {
  const int64_t group = engine->box_rows.group;
  double cost = 0;
  for (int64_t y = 0; y < size; ++y) {
    int64_t end = std::min(y + group, size) - 1;
    room->rows = std::max(room->rows, int64_t(last[end]) - first[y] + 1);
    if (y % group) continue;
    for (int64_t other = first[y]; other <= last[end]; ++other) {
      int64_t seeing = 0;
      for (int64_t r = y; r <= end; ++r) seeing += first[r] <= other && other <= last[r];
      if (seeing) cost += double(std::max<int64_t>(seeing, 2));
    }
  }
  return cost;
}

// What a class of columns costs, tile by tile: as many pairs as the lane has that sees most. Counts the tiles too.
inline double measure_columns(const int32_t* first, const int32_t* last, int64_t size, Room* room, double* tiles) {
  const int64_t width = width_of_parts(size);
  double cost = 0;
  for (int64_t left = 0; left < size; left += width) {
    int64_t right = std::min(left + width, size);
    room->columns = std::max(room->columns, int64_t(last[right - 1]) - first[left] + 1);
    for (int64_t tile = left; tile < right; tile += engine->lanes, ++*tiles) {
      int64_t longest = 0;
      for (int64_t x = tile; x < std::min(tile + engine->lanes, right); ++x)
        longest = std::max(longest, int64_t(last[x]) - first[x] + 1);
      room->longest = std::max(room->longest, longest);
      cost += double(longest);
    }
  }
  return cost;
}

// Sorts the windows of one side by class and says what it would cost to have its rows across the lanes.
inline void measure(const Boxes& p, const int32_t* first, const int32_t* last, RowSide* side) {
  double planes = 0, rows = 0, columns = 0, tiles = 0;
  for (int axis = 0; axis < 3; first += p.size[axis], last += p.size[axis], ++axis) {
    const int64_t step = p.dilation[axis], size = p.size[axis];
    for (int64_t phase = 0; phase < step && phase < size; ++phase) {
      const int64_t start = int64_t(side->first[axis].size());
      side->classes[axis].push_back(start);
      for (int64_t x = phase; x < size; x += step) {
        side->first[axis].push_back(int32_t((first[x] - phase) / step));
        side->last[axis].push_back(int32_t((last[x] - phase) / step));
      }
      const int32_t *from = side->first[axis].data() + start, *to = side->last[axis].data() + start;
      const int64_t count = int64_t(side->first[axis].size()) - start;
      if (axis == 1) rows += measure_rows(from, to, count, &side->room);
      if (axis == 2) columns += measure_columns(from, to, count, &side->room, &tiles);
      for (int64_t x = 0; axis == 0 && x < count; ++x) {
        int64_t seen = std::max<int64_t>(int64_t(to[x]) - from[x] + 1, 0);
        side->room.planes = std::max(side->room.planes, seen);
        planes += double(seen);
      }
    }
    side->classes[axis].push_back(size);
  }
  side->cost = planes * rows * columns + ROW_OVERHEAD * double(p.size[0] * p.size[1]) * tiles;
}

// Whether a token's scores and the rows that it sees stay in the cache.
inline bool fits(const Room& room) { return room.planes * room.rows * room.longest <= PAIRS; }

// Parts of `rows` rows, or a few more, so that all but the last group are whole.
inline void cut_sheet(const Sheet& sheet, int64_t rows, RowSide* side) {
  rows = (rows + engine->box_rows.group - 1) / engine->box_rows.group * engine->box_rows.group;
  const int64_t total = sheet.size[0] * sheet.size[1], width = width_of_parts(sheet.size[2]);
  for (int64_t from = 0; from < total; from += rows)
    for (int64_t left = 0; left < sheet.size[2]; left += width)
      side->parts.push_back({sheet, from, std::min(from + rows, total), left, std::min(left + width, sheet.size[2])});
}

// Cuts all classes into parts, shorter ones where the threads would otherwise be idle. `heads` counts the batch too.
inline void cut_parts(const Boxes& p, int64_t heads, RowSide* side) {
  int64_t parts = heads, begin[3];
  for (int axis = 0; axis < 3; ++axis) parts *= int64_t(side->classes[axis].size()) - 1;
  const int64_t pieces = (PER_THREAD * p.threads + parts - 1) / parts;
  for (size_t a = 0; a + 1 < side->classes[0].size(); ++a)
    for (size_t c = 0; c + 1 < side->classes[1].size(); ++c)
      for (size_t e = 0; e + 1 < side->classes[2].size(); ++e) {
        const size_t phase[3] = {a, c, e};
        Sheet sheet{};
        int64_t step = 1;
        for (int axis = 2; axis >= 0; step *= p.size[axis--]) {
          begin[axis] = side->classes[axis][phase[axis]];
          sheet.size[axis] = side->classes[axis][phase[axis] + 1] - begin[axis];
          sheet.step[axis] = step * p.dilation[axis];
          sheet.start += step * int64_t(phase[axis]);
          sheet.first[axis] = side->first[axis].data() + begin[axis];
          sheet.last[axis] = side->last[axis].data() + begin[axis];
        }
        const int64_t total = sheet.size[0] * sheet.size[1];
        cut_sheet(sheet, std::max((total + pieces - 1) / pieces, std::min(side->room.rows, total)), side);
      }
}

}  // namespace saccade

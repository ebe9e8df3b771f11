// Attention within boxes of a grid, cut into tiles and shared out over threads.
#include <vector>

#include "box_parts.hpp"
#include "engine.hpp"
#include "export.hpp"
#include "problem_boxes.hpp"
#include "threads.hpp"

using namespace saccade;

namespace {

constexpr int64_t TILES = 8;        // of a unit of work
constexpr double OVERHEAD = 16;     // what a tile costs beside the rows it reads, in rows

// Windows of one side along each axis, and the strips that the chosen tiles are made of.
struct Side {
  Tiling tiling;
  std::vector<Strip> strips[3];
  double cost;  // of a head, in rows that a vector of tokens is multiplied by

  int64_t tiles() const { return tiling.strip_count[0] * tiling.strip_count[1] * tiling.strip_count[2]; }
};

std::vector<Strip> cut(const int32_t* first, const int32_t* last, int64_t size, int64_t dilation, int64_t length) {
  std::vector<Strip> strips;
  for (int64_t phase = 0; phase < dilation; ++phase)
    for (int64_t start = phase; start < size; start += length * dilation) {
      Strip strip{int32_t(start), 0, INT32_MAX, -1};
      for (int64_t x = start; x < size && strip.count < length; x += dilation, ++strip.count) {
        if (last[x] < first[x]) continue;
        if (first[x] < strip.low) strip.low = first[x];
        if (last[x] > strip.high) strip.high = last[x];
      }
      if (strip.high < 0) strip.low = 0;  // empty: low .. -1
      strips.push_back(strip);
    }
  return strips;
}

// Takes the shape of tile whose boxes' unions have the fewest rows.
void choose(const Boxes& p, const int32_t* first, const int32_t* last, Side* side) {
  double rows[3][5], count[3][5];
  int powers = 0;
  while (1 << powers < engine->lanes) ++powers;
  Tiling& t = side->tiling;
  for (int i = 0; i < 3; ++i) {
    t.first[i] = first;
    t.last[i] = last;
    first += p.size[i];
    last += p.size[i];
    for (int n = 0; n <= powers; ++n) {
      std::vector<Strip> strips = cut(t.first[i], t.last[i], p.size[i], p.dilation[i], int64_t(1) << n);
      rows[i][n] = 0;
      count[i][n] = double(strips.size());
      for (const Strip& strip : strips) rows[i][n] += double((strip.high - strip.low) / p.dilation[i] + 1);
    }
  }
  double best = -1;
  int chosen[3] = {};
  for (int a = 0; a <= powers; ++a)
    for (int c = 0; a + c <= powers; ++c) {
      int n[3] = {a, c, powers - a - c};
      double cost = rows[0][n[0]] * rows[1][n[1]] * rows[2][n[2]] + OVERHEAD * count[0][n[0]] * count[1][n[1]] * count[2][n[2]];
      if (best >= 0 && cost >= best) continue;
      best = cost;
      for (int i = 0; i < 3; ++i) chosen[i] = n[i];
    }
  side->cost = best;
  for (int i = 0; i < 3; ++i) {
    t.shape[i] = 1 << chosen[i];
    side->strips[i] = cut(t.first[i], t.last[i], p.size[i], p.dilation[i], t.shape[i]);
    t.strips[i] = side->strips[i].data();
    t.strip_count[i] = int64_t(side->strips[i].size());
  }
  for (int i = 0; i < 3; ++i) {
    int inner = i == 2 ? 1 : i == 1 ? t.shape[2] : t.shape[1] * t.shape[2];
    for (uint32_t& lanes : t.lanes[i]) lanes = 0;
    for (int lane = 0; lane < engine->lanes; ++lane) {
      t.at[i][lane] = lane / inner % t.shape[i];
      t.lanes[i][t.at[i][lane]] |= 1u << lane;
    }
  }
}

// By which queries each key is seen: as the windows' ends rise, these are neighbours too. Two pointers, class by class.
void turn(const Boxes& p, std::vector<int32_t>* first, std::vector<int32_t>* last) {
  int64_t base = 0;
  for (int i = 0; i < 3; base += p.size[i++]) {
    const int32_t *from = p.first + base, *to = p.last + base;
    int64_t step = p.dilation[i];
    for (int64_t phase = 0; phase < step && phase < p.size[i]; ++phase) {
      int64_t low = phase, high = phase;
      for (int64_t y = phase; y < p.size[i]; y += step) {
        while (low < p.size[i] && to[low] < y) low += step;
        while (high < p.size[i] && from[high] <= y) high += step;
        (*first)[base + y] = int32_t(low);
        (*last)[base + y] = int32_t(high - step);
      }
    }
  }
}

// Whether the windows lie on the grid, in their own class, and rise.
bool sound(const Boxes& p) {
  int64_t base = 0;
  for (int i = 0; i < 3; base += p.size[i++])
    for (int64_t x = 0; x < p.size[i]; ++x) {
      int64_t first = p.first[base + x], last = p.last[base + x], step = p.dilation[i];
      if (first < 0 || last >= p.size[i] || last < first || (first - x) % step || (last - x) % step) return false;
      if (x >= step && (first < p.first[base + x - step] || last < p.last[base + x - step])) return false;
    }
  return true;
}

// One pass of the engine over one side: by compact tiles or by rows.
struct Pass {
  void (*tile)(const Boxes&, const Tiling&, char*, int64_t b, int64_t h, int64_t tile);
  void (*rows)(const Boxes&, const Room&, const SheetPart&, char*, int64_t b, int64_t h);
};

int run_tiles(const Boxes& p, const Side& side, int64_t heads, const Pass& pass) {
  int64_t count = side.tiles(), units = (count + TILES - 1) / TILES;
  return share_out(p.threads, p.batch * heads * units, engine->boxes.scratch(p), [&](int64_t number, char* scratch) {
    int64_t first = number % units * TILES, head = number / units;
    for (int64_t n = first; n < first + TILES && n < count; ++n)
      pass.tile(p, side.tiling, scratch, head / heads, head % heads, n);
  });
}

int run_rows(const Boxes& p, RowSide& side, int64_t heads, const Pass& pass) {
  cut_parts(p, p.batch * heads, &side);
  const int64_t count = int64_t(side.parts.size());
  return share_out(p.threads, p.batch * heads * count, engine->box_rows.scratch(p, side.room), [&](int64_t number, char* scratch) {
    int64_t head = number / count;
    pass.rows(p, side.room, side.parts[size_t(number % count)], scratch, head / heads, head % heads);
  });
}

int run(const Boxes& p, const int32_t* first, const int32_t* last, int64_t heads, const Pass& pass) {
  Side tiles;
  RowSide rows;
  choose(p, first, last, &tiles);
  measure(p, first, last, &rows);
  bool by_rows = p.across ? p.across == 2 : fits(rows.room) && rows.cost < tiles.cost;
  return by_rows ? run_rows(p, rows, heads, pass) : run_tiles(p, tiles, heads, pass);
}

// The problem with windows of all three axes; those of an axis of one token are 0 .. 0.
struct Whole {
  std::vector<int32_t> first, last;
  Boxes problem;

  explicit Whole(const Boxes& p) : first(size_t(p.missing)), last(size_t(p.missing)), problem(p) {
    int64_t given = 0;
    for (int i = p.missing; i < 3; ++i) given += p.size[i];
    first.insert(first.end(), p.first, p.first + given);
    last.insert(last.end(), p.last, p.last + given);
    problem.first = first.data();
    problem.last = last.data();
    problem.missing = 0;
  }
};

int forward(const Boxes& p) {
  if (!sound(p)) return 2;
  return run(p, p.first, p.last, p.heads, {engine->boxes.forward, engine->box_rows.forward});
}

int backward(const Boxes& p) {
  if (!sound(p)) return 2;
  Pass queries{engine->boxes.backward_queries, engine->box_rows.backward_queries};
  Pass keys{engine->boxes.backward_keys, engine->box_rows.backward_keys};
  if (run(p, p.first, p.last, p.heads, queries)) return 1;
  const size_t total = size_t(p.size[0] + p.size[1] + p.size[2]);
  std::vector<int32_t> first(total), last(total);
  turn(p, &first, &last);
  return run(p, first.data(), last.data(), p.kv_heads, keys);
}

}  // namespace

// 0; 1 if memory ran out; 2 if the windows are not what they must be.
EXPORT int saccade_boxes(const Boxes* p) {
  try {
    return forward(Whole(*p).problem);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

EXPORT int saccade_boxes_backward(const Boxes* p) {
  try {
    return backward(Whole(*p).problem);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

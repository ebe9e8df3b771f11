// Attention within boxes of a grid with a row of tokens across the lanes. Rows of the other side are held transposed,
// [channel][column]: the j-th column that each lane sees is then one vector, read at an address that moves with j, and
// every product is of a pair that is kept. Where windows do not move by one from lane to lane (at the borders) a shuffle
// puts the columns in place. A few rows of this side share what is read.
#pragma once
#include "problem_boxes.hpp"
#include "rows.hpp"
#include "scores.hpp"

namespace saccade::SACCADE_ISA {

constexpr int ROW_GROUP = LANES == 16 ? 3 : 2;  // rows that share what is read, and columns that are worked on at a time:
constexpr int ROW_SPAN = LANES == 16 ? 7 : 4;   // their product accumulators fit the registers

// What the lanes of a tile see along the last axis.
struct Window {
  int64_t base;       // column of the ring that the first lane sees first
  int longest;        // columns that a lane sees, at most
  bool straight;      // all lanes see as many, each from one column further than the lane before
  bool near;          // first columns differ by less than a vector
  vi place, length;   // first column of each lane, from `base`; how many it sees
};

// How to take the j-th column of each lane from `column`, that of the first lane; 0 where a lane sees fewer.
struct Straight {
  INLINE vf take(const float* column, int) { return load(column); }
};

struct Bent {
  vi place, length;
  vf take(const float* column, int j) const {
    vf x = __builtin_shuffle(load(column), place);
    return splat(j) < length ? x : vf{};
  }
};

struct Scattered {
  vi place, length;
  vf take(const float* column, int j) const {
    vf x = {};
    for (int i = 0; i < LANES; ++i)
      if (j < length[i]) x[i] = column[place[i]];
    return x;
  }
};

// A row of the other side from where the first lane sees it: [channels][width].
struct Slid {
  const float* columns;
  int64_t width;
  int channels, length;
};

// out[r][j][lane] = sum over channels of mine[r][channel][lane] * (the j-th column of the lane)[channel]
template <int R, int J, class Take>
INLINE void slide_product(const Slid& other, int from, const Take& take, const float* mine, int64_t apart, float* out,
                          int64_t out_apart) {
  vf acc[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) acc[r][j] = vf{};
  const float* columns = other.columns + from;
  for (int d = 0; d < other.channels; ++d, columns += other.width, mine += LANES) {
    vf row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = load(mine + r * apart);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      vf x = take.take(columns + j, from + j);
      if constexpr (R > 1) x = hold(x);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][j] += row[r] * x;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) store(out + r * out_apart + (from + j) * LANES, acc[r][j]);
}

// out[r][channel][lane] += sum over j of weights[r][j][lane] * (the j-th column of the lane)[channel]
template <int R, int J, class Take>
INLINE void slide_accumulate(const Slid& other, int from, const Take& take, const float* weights, int64_t apart, float* out,
                             int64_t out_apart) {
  vf weight[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) weight[r][j] = load(weights + r * apart + (from + j) * LANES);
  const float* columns = other.columns + from;
  for (int e = 0; e < other.channels; ++e, columns += other.width, out += LANES) {
    vf acc[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = load(out + r * out_apart);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      vf x = take.take(columns + j, from + j);
      if constexpr (R > 1) x = hold(x);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] += weight[r][j] * x;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(out + r * out_apart, acc[r]);
  }
}

// Calls work<J>(from) for runs of J columns that make up `length`.
template <class Work>
INLINE void in_spans(int length, const Work& work) {
  int from = 0;
  for (; from + ROW_SPAN <= length; from += ROW_SPAN) work.template operator()<ROW_SPAN>(from);
  if constexpr (ROW_SPAN > 5)
    for (; from + 5 <= length; from += 5) work.template operator()<5>(from);
  for (; from + 3 <= length; from += 3) work.template operator()<3>(from);
  for (; from < length; ++from) work.template operator()<1>(from);
}

template <int R, class Take>
static void slide_products(const Slid& other, const Take& take, const float* mine, int64_t apart, float* out, int64_t out_apart) {
  in_spans(other.length, [&]<int J>(int from) __attribute__((always_inline)) {
    slide_product<R, J>(other, from, take, mine, apart, out, out_apart);
  });
}

template <int R, class Take>
static void slide_sums(const Slid& other, const Take& take, const float* weights, int64_t apart, float* out, int64_t out_apart) {
  in_spans(other.length, [&]<int J>(int from) __attribute__((always_inline)) {
    slide_accumulate<R, J>(other, from, take, weights, apart, out, out_apart);
  });
}

template <class Work>
INLINE void with_rows(int count, const Work& work) {
  if (count == 1) work.template operator()<1>();
  if (count == 2) work.template operator()<2>();
  if constexpr (ROW_GROUP > 2)
    if (count == 3) work.template operator()<3>();
}

template <class Work>
INLINE void with_take(const Window& window, const Work& work) {
  if (window.straight) return work(Straight{});
  if constexpr (LANES > 4)  // a shuffle by variable places is one instruction
    if (window.near) return work(Bent{window.place, window.length});
  work(Scattered{window.place, window.length});
}

struct RowScratch {
  float *ring, *ring_too;    // [slot][dim or value_dim][width]: rows of the other side, k and v or q and grad_out
  float *lse, *delta;        // [slot][width], of queries there
  int64_t* held;             // [slot]: which row it holds; -1: none
  float *mine, *mine_too;    // [ROW_GROUP][dim or value_dim][LANES]: q and grad_out, or k and v
  float *total, *total_too;  // [ROW_GROUP][dim or value_dim][LANES], what is summed
  float *scores, *slopes;    // [ROW_GROUP][pairs][LANES]
};

constexpr int RUNS = 8 * ROW_GROUP;

// Tokens that the next group of rows needs, for which the cache is asked a few at a time while this one is worked on.
struct Run {
  const char* place;
  int64_t apart, bytes, left;
};

class BoxRows {
 public:
  BoxRows(const Boxes& problem, const Room& room, const SheetPart& part, char* memory, int64_t b)
      : p(problem), room(room), part(part), sheet(part.sheet), b(b) {
    lay_out(p, room, &s, memory);
    origin = sheet.first[2][part.left];
    columns = sheet.last[2][part.right - 1] - origin + 1;
  }

  // Bytes of a thread's scratch; with `memory` also lays it out there (64-byte aligned).
  static int64_t lay_out(const Boxes& p, const Room& room, RowScratch* scratch, char* memory) {
    int64_t used = 0, slots = room.planes * room.rows, width = width_of(room);
    int64_t widest = p.dim > p.value_dim ? p.dim : p.value_dim;
    auto take = [&](int64_t floats) {
      char* place = memory + used;
      used += (floats * 4 + 63) / 64 * 64;
      return reinterpret_cast<float*>(place);
    };
    RowScratch s;
    s.ring = take(slots * p.dim * width);
    s.ring_too = take(slots * p.value_dim * width);
    s.lse = take(slots * width);
    s.delta = take(slots * width);
    s.held = reinterpret_cast<int64_t*>(take(slots * 2));
    s.mine = take(ROW_GROUP * widest * LANES);
    s.mine_too = take(ROW_GROUP * widest * LANES);
    s.total = take(ROW_GROUP * widest * LANES);
    s.total_too = take(ROW_GROUP * widest * LANES);
    s.scores = take(ROW_GROUP * pairs_of(room) * LANES);
    s.slopes = take(ROW_GROUP * room.longest * LANES);
    if (scratch) *scratch = s;
    return used;
  }

  void forward(int64_t h) {
    head = h;
    group = h / (p.heads / p.kv_heads);
    for (int64_t i = 0; i < room.planes * room.rows; ++i) s.held[i] = -1;
    each_group([&] {
      each_seen([&](int64_t, int64_t row, int slot, int, int) {
        if (s.held[slot] == row) return;
        s.held[slot] = row;
        fetch(p.k, group, p.storage, p.dim, row, s.ring + slot * p.dim * width_of(room));
        fetch(p.v, group, p.storage, p.value_dim, row, s.ring_too + slot * p.value_dim * width_of(room));
      });
      if (expect_others(p.k, group, p.storage, p.dim) && expect_others(p.v, group, p.storage, p.value_dim))
        expect_own(p.q, head, p.storage, p.dim);
      ration(2);
      each_tile([&] { forward_tile(); });
    });
  }

  // Gradients of queries, and delta = grad_out . out - grad_lse, which the keys' turn needs.
  void backward_queries(int64_t h) {
    head = h;
    group = h / (p.heads / p.kv_heads);
    for (int64_t i = 0; i < room.planes * room.rows; ++i) s.held[i] = -1;
    each_group([&] {
      each_seen([&](int64_t, int64_t row, int slot, int, int) {
        if (s.held[slot] == row) return;
        s.held[slot] = row;
        fetch(p.k, group, p.storage, p.dim, row, s.ring + slot * p.dim * width_of(room));
        fetch(p.v, group, p.storage, p.value_dim, row, s.ring_too + slot * p.value_dim * width_of(room));
      });
      if (expect_others(p.k, group, p.storage, p.dim) && expect_others(p.v, group, p.storage, p.value_dim)) {
        expect_own(p.q, head, p.storage, p.dim);
        expect_own(rows_at(p.grad_out), head, FP32, p.value_dim);
        expect_own(rows_at(p.out), head, FP32, p.value_dim);
      }
      ration(3);
      each_tile([&] { queries_tile(); });
    });
  }

  // Gradients of keys and values, from all heads that read them, one after another.
  void backward_keys(int64_t g) {
    group = g;
    int64_t shared = p.heads / p.kv_heads;
    for (head = g * shared; head < (g + 1) * shared; ++head) {
      bool begins = head == g * shared, ends = head == (g + 1) * shared - 1;
      for (int64_t i = 0; i < room.planes * room.rows; ++i) s.held[i] = -1;
      each_group([&] {
        each_seen([&](int64_t, int64_t row, int slot, int, int) {
          if (s.held[slot] == row) return;
          s.held[slot] = row;
          fetch(p.q, head, p.storage, p.dim, row, s.ring + slot * p.dim * width_of(room));
          fetch(rows_at(p.grad_out), head, FP32, p.value_dim, row, s.ring_too + slot * p.value_dim * width_of(room));
          fetch_numbers(row, slot * width_of(room));
        });
        if (expect_others(p.q, head, p.storage, p.dim) && expect_others(rows_at(p.grad_out), head, FP32, p.value_dim)) {
          expect_own(p.k, group, p.storage, p.dim);
          expect_own(p.v, group, p.storage, p.value_dim);
        }
        ration(4);
        each_tile([&] { keys_tile(begins, ends); });
      });
    }
  }

 private:
  const Boxes& p;
  const Room& room;
  const SheetPart& part;
  const Sheet& sheet;
  RowScratch s;
  const int64_t b;
  int64_t head = 0, group = 0;
  int64_t origin, columns;       // of the other side that this part sees
  int64_t plane = 0, line = 0;   // of the group's first row
  int count = 0;                 // rows of the group
  int64_t left = 0;              // the tile's first column
  int live = 0;                  // lanes with a token
  Window window;
  vf lse[ROW_GROUP], delta[ROW_GROUP];
  Run runs[RUNS];
  int pending = 0;
  int64_t dose = 0;              // tokens to ask for at a time

  // An odd number of vectors, so that channels spread over the cache's sets; the last one may be read, but never used.
  static int64_t width_of(const Room& room) { return (((room.columns + LANES - 1) / LANES + 1) | 1) * LANES; }
  static int64_t pairs_of(const Room& room) { return room.planes * room.rows * room.longest; }

  int64_t tokens() const { return p.size[0] * p.size[1] * p.size[2]; }
  int64_t token(int64_t row, int64_t column) const {
    return sheet.start + row / sheet.size[1] * sheet.step[0] + row % sheet.size[1] * sheet.step[1] + column * sheet.step[2];
  }
  int64_t first_token(int r) const { return token(plane * sheet.size[1] + line + r, left); }

  // A contiguous fp32 tensor [B, H, N, E].
  Rows rows_at(const float* data) const {
    return {data, p.heads * tokens() * p.value_dim, tokens() * p.value_dim, p.value_dim};
  }

  template <class Work>
  void each_group(const Work& work) {
    for (int64_t row = part.from; row < part.to; row += count) {
      plane = row / sheet.size[1];
      line = row % sheet.size[1];
      int64_t most = part.to - row < sheet.size[1] - line ? part.to - row : sheet.size[1] - line;
      count = int(most < ROW_GROUP ? most : ROW_GROUP);
      pending = 0;
      work();
    }
  }

  template <class Work>
  void each_tile(const Work& work) {
    for (left = part.left; left < part.right; left += LANES) {
      live = int(part.right - left < LANES ? part.right - left : LANES);
      look();
      work();
    }
  }

  // Calls work(number, row, slot, from, to) for every row of the other side that rows from .. to - 1 of the group see.
  template <class Work>
  void each_seen(const Work& work) {
    const int32_t *first = sheet.first[1] + line, *last = sheet.last[1] + line;
    for (int64_t z = sheet.first[0][plane]; z <= sheet.last[0][plane]; ++z) {
      int64_t number = (z - sheet.first[0][plane]) * room.rows;
      int from = 0, to = 0;
      for (int64_t y = first[0]; y <= last[count - 1]; ++y, ++number) {
        while (from < count && last[from] < y) ++from;
        while (to < count && first[to] <= y) ++to;
        if (from < to) work(number, z * sheet.size[1] + y, int(z % room.planes * room.rows + y % room.rows), from, to);
      }
    }
  }

  // Rows of the group after this one.
  int64_t coming() const {
    int64_t rest = sheet.size[1] - line - count, here = part.to - plane * sheet.size[1] - line - count;
    return rest < here ? (rest < ROW_GROUP ? rest : ROW_GROUP) : (here < ROW_GROUP ? here : ROW_GROUP);
  }

  void expect(const Rows& x, int64_t h, int32_t storage, int64_t dim, int64_t row, int64_t column, int64_t tokens) {
    const int64_t size = storage == FP32 ? 4 : 2;
    if (pending < RUNS)
      runs[pending++] = {row_of(x, b, h, token(row, column), storage), sheet.step[2] * x.row_stride * size, dim * size, tokens};
  }

  // Those rows of the other side that the next group sees and this one does not; whether there is a next group.
  bool expect_others(const Rows& x, int64_t h, int32_t storage, int64_t dim) {
    const int64_t next = coming();
    if (next <= 0) return false;
    const int32_t* last = sheet.last[1] + line + count - 1;
    for (int64_t z = sheet.first[0][plane]; z <= sheet.last[0][plane]; ++z)
      for (int64_t y = last[0] + 1; y <= last[next]; ++y) expect(x, h, storage, dim, z * sheet.size[1] + y, origin, columns);
    return true;
  }

  void expect_own(const Rows& x, int64_t h, int32_t storage, int64_t dim) {
    const int64_t row = plane * sheet.size[1] + line + count;
    for (int64_t r = 0; r < coming(); ++r) expect(x, h, storage, dim, row + r, part.left, part.right - part.left);
  }

  // Spreads what is expected over `uses` calls of ask for every row that every tile sees.
  void ration(int64_t uses) {
    int64_t tokens = 0, seen = sheet.last[1][line + count - 1] - sheet.first[1][line] + 1;
    for (int i = 0; i < pending; ++i) tokens += runs[i].left;
    int64_t calls = uses * ((part.right - part.left + LANES - 1) / LANES) * (seen > 0 ? seen : 1);
    dose = (tokens + calls - 1) / calls;
  }

  void ask() {
    for (int64_t tokens = dose; tokens && pending;) {
      Run& run = runs[pending - 1];
      for (; tokens && run.left; --tokens, --run.left, run.place += run.apart)
        for (int64_t at = 0; at < run.bytes; at += 64) __builtin_prefetch(run.place + at, 0, 2);
      if (!run.left) --pending;
    }
  }

  // The lanes' windows. Lanes without a token repeat the last that has one.
  void look() {
    const int32_t *first = sheet.first[2], *last = sheet.last[2];
    window.base = first[left] - origin;
    window.longest = 0;
    window.straight = window.near = true;
    for (int i = 0; i < LANES; ++i) {
      int64_t x = left + (i < live ? i : live - 1);
      int length = last[x] < first[x] ? 0 : last[x] - first[x] + 1;
      window.place[i] = first[x] - first[left];
      window.length[i] = length;
      if (length > window.longest) window.longest = length;
      if (window.place[i] != i || length != window.length[0]) window.straight = false;
      if (window.place[i] >= LANES) window.near = false;
    }
  }

  // A row of the other side, transposed. Beyond its end the last column is repeated; nobody uses that.
  void fetch(const Rows& x, int64_t h, int32_t storage, int64_t dim, int64_t row, float* out) {
    const char* place[LANES];
    for (int64_t c = 0; c < columns; c += LANES) {
      const char* start = row_of(x, b, h, token(row, origin + c), storage);
      int64_t apart = sheet.step[2] * x.row_stride * (storage == FP32 ? 4 : 2);
      for (int i = 0; i < LANES; ++i) place[i] = start + (c + i < columns ? i : columns - 1 - c) * apart;
      pack_rows(place, storage, dim, 1.0f, out + c, width_of(room), 2 * LANES * apart);
    }
  }

  // Of queries: lse, in powers of two, +inf where nothing is seen (weights are 0 then); and delta.
  void fetch_numbers(int64_t row, int64_t place) {
    const int64_t base = (b * p.heads + head) * tokens();
    for (int64_t c = 0; c < columns; ++c) {
      int64_t at = base + token(row, origin + c);
      s.lse[place + c] = p.lse[at] == -INF ? INF : p.lse[at] * LOG2E;
      s.delta[place + c] = p.delta[at];
    }
  }

  // Rows of this side's tokens, times `factor`, across the lanes; what lies in lanes without a token nobody uses.
  void pack(const Rows& x, int64_t h, int32_t storage, int64_t dim, float factor, float* out) {
    const char* place[LANES];
    for (int r = 0; r < count; ++r) {
      const char* start = row_of(x, b, h, first_token(r), storage);
      int64_t apart = sheet.step[2] * x.row_stride * (storage == FP32 ? 4 : 2);
      for (int i = 0; i < LANES; ++i) place[i] = start + (i < live ? i : live - 1) * apart;
      pack_rows(place, storage, dim, factor, out + r * dim * LANES, LANES, LANES * apart);
    }
  }

  // The inverse for the r-th row of the group, into rows of a contiguous [N, dim].
  void unpack(int r, const float* from, int64_t dim, vf factor, float* out) {
    float *place[LANES], *start = out + first_token(r) * dim;
    for (int i = 0; i < LANES; ++i) place[i] = i < live ? start + i * sheet.step[2] * dim : nullptr;
    unpack_rows(from + r * dim * LANES, dim, factor, place);
  }

  void clear(float* total, int64_t dim) {
    for (int64_t i = 0; i < count * dim * LANES; i += LANES) store(total + i, vf{});
  }

  Slid slid(const float* ring, int64_t dim, int slot) const {
    return {ring + slot * dim * width_of(room) + window.base, width_of(room), int(dim), window.longest};
  }

  void products(const float* ring, int64_t dim, int slot, int from, int to, const float* mine, float* out, int64_t apart) {
    Slid other = slid(ring, dim, slot);
    ask();
    with_take(window, [&](const auto& take) {
      with_rows(to - from, [&]<int R>() {
        slide_products<R>(other, take, mine + from * dim * LANES, dim * LANES, out + from * apart, apart);
      });
    });
  }

  void add(const float* ring, int64_t dim, int slot, int from, int to, const float* weights, int64_t apart, float* total) {
    Slid other = slid(ring, dim, slot);
    ask();
    with_take(window, [&](const auto& take) {
      with_rows(to - from, [&]<int R>() {
        slide_sums<R>(other, take, weights + from * apart, apart, total + from * dim * LANES, dim * LANES);
      });
    });
  }

  void forward_tile() {
    const int64_t apart = pairs_of(room) * LANES, base = (b * p.heads + head) * tokens();
    pack(p.q, head, p.storage, p.dim, p.scale * LOG2E, s.mine);
    each_seen([&](int64_t number, int64_t, int slot, int from, int to) {
      products(s.ring, p.dim, slot, from, to, s.mine, s.scores + number * window.longest * LANES, apart);
    });
    vf top[ROW_GROUP], sum[ROW_GROUP];
    for (int r = 0; r < count; ++r) soften(r, s.scores + r * apart, &top[r], &sum[r]);
    clear(s.total, p.value_dim);
    each_seen([&](int64_t number, int64_t, int slot, int from, int to) {
      add(s.ring_too, p.value_dim, slot, from, to, s.scores + number * window.longest * LANES, apart, s.total);
    });
    for (int r = 0; r < count; ++r) {
      unpack(r, s.total, p.value_dim, sum[r] == 0.0f ? vf{} : 1.0f / sum[r], p.out + base * p.value_dim);
      vf lse = sum[r] == 0.0f ? splat(-INF) : top[r] * LN2 + logv(sum[r]);
      float* out = p.lse + base + first_token(r);
      for (int i = 0; i < live; ++i) out[i * sheet.step[2]] = lse[i];
    }
  }

  // Scores of the r-th row become weights.
  void soften(int r, float* scores, vf* top, vf* sum) {
    const int32_t* first = sheet.first[1] + line;
    const int64_t planes = sheet.last[0][plane] - sheet.first[0][plane] + 1, next = room.rows * window.longest * LANES;
    const int64_t pairs = (sheet.last[1][line + r] - first[r] + 1) * window.longest * LANES;
    scores += (first[r] - first[0]) * window.longest * LANES;
    vf high = splat(-INF), total = {};
    for (int64_t z = 0; z < planes; ++z) {
      if (!window.straight) hide(scores + z * next, scores + z * next + pairs);
      for (int64_t i = 0; i < pairs; i += LANES) {
        vf x = load(scores + z * next + i);
        high = x > high ? x : high;
      }
    }
    vf shift = high == -INF ? vf{} : high;  // nothing visible: any finite shift keeps weights 0
    for (int64_t z = 0; z < planes; ++z)
      for (int64_t i = 0; i < pairs; i += LANES) {
        float* place = scores + z * next + i;
        vf weight = exp2v(load(place) - shift);
        store(place, weight);
        total += weight;
      }
    *top = high;
    *sum = total;
  }

  // Lanes that see fewer columns than others.
  void hide(float* scores, const float* end) const {
    for (; scores < end; scores += window.longest * LANES)
      for (int j = 0; j < window.longest; ++j) {
        vf x = load(scores + j * LANES);
        store(scores + j * LANES, splat(j) < window.length ? x : splat(-INF));
      }
  }

  void queries_tile() {
    const int64_t base = (b * p.heads + head) * tokens(), apart = room.longest * LANES;
    pack(rows_at(p.out), head, FP32, p.value_dim, 1.0f, s.mine);
    pack(rows_at(p.grad_out), head, FP32, p.value_dim, 1.0f, s.mine_too);
    for (int r = 0; r < count; ++r) {
      const int64_t start = base + first_token(r), place = r * p.value_dim * LANES;
      vf product = {};
      for (int64_t e = 0; e < p.value_dim * LANES; e += LANES) product += load(s.mine + place + e) * load(s.mine_too + place + e);
      lse[r] = splat(INF);
      for (int i = 0; i < live; ++i) {
        int64_t row = start + i * sheet.step[2];
        float change = product[i] - (p.grad_lse ? p.grad_lse[row] : 0);
        if (p.lse[row] == -INF) change = 0;  // it sees nothing; lse = +inf makes its weights 0
        else lse[r][i] = p.lse[row] * LOG2E;
        p.delta[row] = change;
        product[i] = change;
      }
      delta[r] = product;
    }
    pack(p.q, head, p.storage, p.dim, p.scale * LOG2E, s.mine);
    clear(s.total, p.dim);
    each_seen([&](int64_t, int64_t, int slot, int from, int to) {
      products(s.ring, p.dim, slot, from, to, s.mine, s.scores, apart);
      products(s.ring_too, p.value_dim, slot, from, to, s.mine_too, s.slopes, apart);
      for (int r = from; r < to; ++r)
        slopes(s.scores + r * apart, s.slopes + r * apart, [&](int) { return lse[r]; }, [&](int) { return delta[r]; });
      add(s.ring, p.dim, slot, from, to, s.slopes, apart, s.total);
    });
    for (int r = 0; r < count; ++r) unpack(r, s.total, p.dim, splat(p.scale), p.dq + base * p.dim);
  }

  void keys_tile(bool begins, bool ends) {
    const int64_t base = (b * p.kv_heads + group) * tokens(), apart = room.longest * LANES;
    pack(p.k, group, p.storage, p.dim, p.scale * LOG2E, s.mine);
    pack(p.v, group, p.storage, p.value_dim, 1.0f, s.mine_too);
    if (begins) {
      clear(s.total, p.dim);
      clear(s.total_too, p.value_dim);
    } else {
      pack({p.dk, p.kv_heads * tokens() * p.dim, tokens() * p.dim, p.dim}, group, FP32, p.dim, 1.0f, s.total);
      pack({p.dv, p.kv_heads * tokens() * p.value_dim, tokens() * p.value_dim, p.value_dim}, group, FP32, p.value_dim, 1.0f,
           s.total_too);
    }
    each_seen([&](int64_t, int64_t, int slot, int from, int to) {
      products(s.ring, p.dim, slot, from, to, s.mine, s.scores, apart);
      products(s.ring_too, p.value_dim, slot, from, to, s.mine_too, s.slopes, apart);
      const float *lse = s.lse + slot * width_of(room) + window.base, *delta = s.delta + slot * width_of(room) + window.base;
      with_take(window, [&](const auto& take) {
        for (int r = from; r < to; ++r)
          slopes(s.scores + r * apart, s.slopes + r * apart, [&](int j) { return take.take(lse + j, j); },
                 [&](int j) { return take.take(delta + j, j); });
      });
      add(s.ring, p.dim, slot, from, to, s.slopes, apart, s.total);
      add(s.ring_too, p.value_dim, slot, from, to, s.scores, apart, s.total_too);
    });
    for (int r = 0; r < count; ++r) {
      unpack(r, s.total, p.dim, splat(ends ? p.scale : 1.0f), p.dk + base * p.dim);
      unpack(r, s.total_too, p.value_dim, splat(1.0f), p.dv + base * p.value_dim);
    }
  }

  // Scores become weights, and grad_out . v gradients of the scores.
  template <class Lse, class Delta>
  void slopes(float* scores, float* slopes, const Lse& lse, const Delta& delta) const {
    for (int j = 0; j < window.longest; ++j) {
      vf shift = lse(j), weight = exp2v(load(scores + j * LANES) - shift);
      vf slope = weight * (load(slopes + j * LANES) - delta(j));
      vi seen = (splat(j) < window.length) & (shift != INF);
      store(scores + j * LANES, seen ? weight : vf{});
      store(slopes + j * LANES, seen ? slope : vf{});
    }
  }
};

static const RowsEngine BOX_ROWS = {
    .group = ROW_GROUP,
    .scratch = [](const Boxes& p, const Room& room) { return BoxRows::lay_out(p, room, nullptr, nullptr); },
    .forward = [](const Boxes& p, const Room& room, const SheetPart& part, char* memory, int64_t b, int64_t h) {
      BoxRows(p, room, part, memory, b).forward(h);
    },
    .backward_queries = [](const Boxes& p, const Room& room, const SheetPart& part, char* memory, int64_t b, int64_t h) {
      BoxRows(p, room, part, memory, b).backward_queries(h);
    },
    .backward_keys = [](const Boxes& p, const Room& room, const SheetPart& part, char* memory, int64_t b, int64_t g) {
      BoxRows(p, room, part, memory, b).backward_keys(g);
    },
};

}  // namespace saccade::SACCADE_ISA

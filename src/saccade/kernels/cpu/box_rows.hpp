// Attention within boxes of a grid with a row of tokens across the lanes. Rows of the other side are held transposed,
// [channel][column]: the j-th column that each lane sees is then one vector, read at an address that moves with j, and
// every product is of a pair that is kept. Where windows do not move by one from lane to lane (at the borders) a shuffle
// puts the columns in place. A few rows of this side share what is read.
#pragma once
#include "box_slides.hpp"
#include "problem_boxes.hpp"
#include "rows.hpp"
#include "scores.hpp"

namespace saccade::SACCADE_ISA {

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

// Rows of one head of a tensor.
struct Source {
  Rows rows;
  int64_t head;
  int32_t storage;
  int64_t dim;

  int64_t apart(const Sheet& sheet) const { return sheet.step[2] * rows.row_stride * (storage == FP32 ? 4 : 2); }
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
    enter(h);
    each_tile(keys(), values(), {queries()}, 2, [&] { forward_tile(); });
  }

  // Gradients of queries, and delta = grad_out . out - grad_lse, which the keys' turn needs.
  void backward_queries(int64_t h) {
    enter(h);
    each_tile(keys(), values(), {queries(), grads(), outs()}, 3, [&] { queries_tile(); });
  }

  // Gradients of keys and values, from all heads that read them, one after another.
  void backward_keys(int64_t g) {
    const int64_t shared = p.heads / p.kv_heads, first = g * shared, end = first + shared;
    turned = true;
    for (int64_t h = first; h < end; ++h) {
      enter(h);
      each_tile(queries(), grads(), {keys(), values()}, 4, [&] { keys_tile(h == first, h == end - 1); });
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
  bool turned = false;           // keys lie across the lanes, and what they see are queries
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

  Source queries() const { return {p.q, head, p.storage, p.dim}; }
  Source keys() const { return {p.k, group, p.storage, p.dim}; }
  Source values() const { return {p.v, group, p.storage, p.value_dim}; }
  Source grads() const { return contiguous(p.grad_out, p.heads, head, p.value_dim); }
  Source outs() const { return contiguous(p.out, p.heads, head, p.value_dim); }
  Source contiguous(const float* data, int64_t heads, int64_t h, int64_t dim) const {
    return {{data, heads * tokens() * dim, tokens() * dim, dim}, h, FP32, dim};
  }

  void enter(int64_t h) {
    head = h;
    group = h / (p.heads / p.kv_heads);
    for (int64_t i = 0; i < room.planes * room.rows; ++i) s.held[i] = -1;
  }

  // Calls work() for every tile, group of rows by group of rows, with the rows that it sees of `other` and `other_too` in the
  // rings. `mine` is what is read of the group's own tokens, `uses` how often work reads a row of the other side.
  template <int N, class Work>
  void each_tile(const Source& other, const Source& other_too, const Source (&mine)[N], int64_t uses, const Work& work) {
    for (int64_t row = part.from; row < part.to; row += count) {
      plane = row / sheet.size[1];
      line = row % sheet.size[1];
      int64_t most = part.to - row < sheet.size[1] - line ? part.to - row : sheet.size[1] - line;
      count = int(most < ROW_GROUP ? most : ROW_GROUP);
      each_seen([&](int64_t, int64_t seen, int slot, int, int) {
        if (s.held[slot] == seen) return;
        s.held[slot] = seen;
        fetch(other, seen, s.ring + slot * other.dim * width_of(room));
        fetch(other_too, seen, s.ring_too + slot * other_too.dim * width_of(room));
        if (turned) fetch_numbers(seen, slot * width_of(room));
      });
      pending = 0;
      if (coming() > 0) {
        expect_others(other);
        expect_others(other_too);
        for (const Source& x : mine) expect_own(x);
      }
      ration(uses);
      for (left = part.left; left < part.right; left += LANES) {
        live = int(part.right - left < LANES ? part.right - left : LANES);
        look();
        work();
      }
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

  void expect(const Source& x, int64_t row, int64_t column, int64_t tokens) {
    const char* place = row_of(x.rows, b, x.head, token(row, column), x.storage);
    if (pending < RUNS) runs[pending++] = {place, x.apart(sheet), x.dim * (x.storage == FP32 ? 4 : 2), tokens};
  }

  // Those rows of the other side that the next group sees and this one does not.
  void expect_others(const Source& x) {
    const int32_t* last = sheet.last[1] + line + count - 1;
    for (int64_t z = sheet.first[0][plane]; z <= sheet.last[0][plane]; ++z)
      for (int64_t y = last[0] + 1; y <= last[coming()]; ++y) expect(x, z * sheet.size[1] + y, origin, columns);
  }

  void expect_own(const Source& x) {
    const int64_t row = plane * sheet.size[1] + line + count;
    for (int64_t r = 0; r < coming(); ++r) expect(x, row + r, part.left, part.right - part.left);
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
    window.even = window.straight = window.near = true;
    for (int i = 0; i < LANES; ++i) {
      int64_t x = left + (i < live ? i : live - 1);
      int length = last[x] < first[x] ? 0 : last[x] - first[x] + 1;
      window.place[i] = first[x] - first[left];
      window.length[i] = length;
      if (length > window.longest) window.longest = length;
      if (length != window.length[0]) window.even = false;
      if (window.place[i] != i || !window.even) window.straight = false;
      if (window.place[i] >= LANES) window.near = false;
    }
  }

  // A row of the other side, transposed. Beyond its end the last column is repeated; nobody uses that.
  void fetch(const Source& x, int64_t row, float* out) {
    const char* place[LANES];
    const int64_t apart = x.apart(sheet);
    for (int64_t c = 0; c < columns; c += LANES) {
      const char* start = row_of(x.rows, b, x.head, token(row, origin + c), x.storage);
      for (int i = 0; i < LANES; ++i) place[i] = start + (c + i < columns ? i : columns - 1 - c) * apart;
      pack_rows(place, x.storage, x.dim, 1.0f, out + c, width_of(room), 2 * LANES * apart);
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
  void pack(const Source& x, float factor, float* out) {
    const char* place[LANES];
    const int64_t apart = x.apart(sheet);
    for (int r = 0; r < count; ++r) {
      const char* start = row_of(x.rows, b, x.head, first_token(r), x.storage);
      for (int i = 0; i < LANES; ++i) place[i] = start + (i < live ? i : live - 1) * apart;
      pack_rows(place, x.storage, x.dim, factor, out + r * x.dim * LANES, LANES, LANES * apart);
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
    pack(queries(), p.scale * LOG2E, s.mine);
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
      if (!window.even) hide(scores + z * next, scores + z * next + pairs);
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
    pack(outs(), 1.0f, s.mine);
    pack(grads(), 1.0f, s.mine_too);
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
    pack(queries(), p.scale * LOG2E, s.mine);
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
    pack(keys(), p.scale * LOG2E, s.mine);
    pack(values(), 1.0f, s.mine_too);
    if (begins) {
      clear(s.total, p.dim);
      clear(s.total_too, p.value_dim);
    } else {
      pack(contiguous(p.dk, p.kv_heads, group, p.dim), 1.0f, s.total);
      pack(contiguous(p.dv, p.kv_heads, group, p.value_dim), 1.0f, s.total_too);
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

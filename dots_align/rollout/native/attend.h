// A layer's attention over the tokens of a plan: which queries meet which cached keys, in units for the threads.
#pragma once

#include "attention.h"
#include "model.h"

#include <algorithm>

template <class T>
class Attention {
    static constexpr int STEP = Precision<T>::STEP;
    static constexpr int SEGMENT = 64;     // tokens of a unit, at most
    static constexpr int UNIT_HEADS = 8;   // heads of a unit, at most: neighbours in a row of the cache
    static constexpr int PANELS = SEGMENT / LANES;
    static constexpr int FEW = 6;          // queries that are faster one by one than as lanes of a panel

    // Tokens that hang on neighbouring prefixes, from `prefix` on, which begin with the same `trunk` keys; or, with
    // prefix -1, of a chain that has none.
    struct Segment {
        int prefix, trunk, begin, end;
    };
    // Of one head and a segment's tokens: o [SEGMENT, D], m [SEGMENT], l [SEGMENT]. What has seen some keys goes on with
    // the next ones from here, in either shape.
    struct Partial {
        float *o, *m, *l;
        void clear(int count, int d) const {
            memset(o, 0, sizeof(float) * count * d);
            std::fill_n(m, count, -INFINITY);
            std::fill_n(l, count, 0.f);
        }
    };
    // Up to KEYS cached tokens of a table: offsets of their rows in a layer's keys and values.
    struct Rows {
        int n = 0;
        size_t offset[KEYS];
    };

    const ModelShape& m;
    const PlanArrays& plan;
    const int D, group, q_width, kv_width;
    int unit_heads, head_parts;
    T *queries, *attended;  // [N, heads * D]
    std::vector<int> chain_of;
    std::vector<Segment> segments;

  public:
    std::vector<size_t> slots;  // row of the cache of each token

    Attention(const ModelShape& m, const PlanArrays& plan, int threads, T* queries, T* attended)
        : m(m), plan(plan), D(m.head_dim), group(m.heads / m.kv_heads), q_width(m.heads * D), kv_width(m.kv_heads * D),
          queries(queries), attended(attended), slots(plan.tokens) {
        chain_of.resize(plan.tokens);
        for (int c = 0; c < plan.chains; ++c)
            for (int t = plan.starts[c]; t < plan.starts[c + 1]; ++t) {
                const int number = visible(c, t) - 1;
                const int32_t* table = plan.tables + (size_t)c * plan.table_width;
                slots[t] = (size_t)table[number / plan.block_size] * plan.block_size + number % plan.block_size;
                chain_of[t] = c;
            }
        find_segments();
        // As many heads as there is work for all threads without splitting further.
        unit_heads = std::max(1, std::min({UNIT_HEADS, m.heads, m.heads * (int)segments.size() / (3 * threads)}));
        head_parts = (m.heads + unit_heads - 1) / unit_heads;
    }

    int units() const { return (int)segments.size() * head_parts; }

    void run(Member& me, int layer, int unit) {
        const Segment& segment = segments[unit / head_parts];
        const int first = unit % head_parts * unit_heads, heads = std::min(unit_heads, m.heads - first);
        const size_t size = SEGMENT * (D + 2);
        float* memory = me.scratch[1].get<float>(2 * UNIT_HEADS * size);
        Partial own[UNIT_HEADS], prefix[UNIT_HEADS];
        for (int h = 0; h < heads; ++h)
            for (Partial* part : {&own[h], &prefix[h]}) {
                *part = {memory, memory + SEGMENT * D, memory + SEGMENT * (D + 1)};
                memory += size;
            }
        for (int h = 0; h < heads; ++h) own[h].clear(segment.end - segment.begin, D);
        if (segment.prefix >= 0) {
            for (int h = 0; h < heads; ++h) prefix[h].clear(segment.end - segment.begin, D);
            read_prefixes(me, layer, first, heads, segment, prefix);
        }
        for (int begin = segment.begin, end; begin < segment.end; begin = end) {
            const int c = chain_of[begin];
            end = std::min(segment.end, plan.starts[c + 1]);
            if (end - begin == 1)
                rows(me, layer, first, heads, table_of(c), 0, visible(c, begin), begin, end, segment.begin, own);
            else
                panels(me, layer, first, heads, table_of(c), 0, visible(c, end - 1), begin, end, segment.begin, own,
                       [&](int t) { return visible(c, t); });
        }
        for (int h = 0; h < heads; ++h)
            for (int at = segment.begin; at < segment.end; at += LANES)
                merge(at, std::min(LANES, segment.end - at), at - segment.begin, own[h], segment.prefix < 0 ? nullptr : &prefix[h],
                      first + h);
    }

  private:
    int visible(int chain, int token) const { return plan.cached[chain] + token - plan.starts[chain] + 1; }
    const int32_t* table_of(int chain) const { return plan.tables + (size_t)chain * plan.table_width; }

    void find_segments() {
        const auto cut = [&](int prefix, int trunk, int begin, int end) {
            for (int at = begin; at < end; at += SEGMENT) {
                while (prefix >= 0 && plan.prefix_starts[prefix + 1] <= at) ++prefix;
                segments.push_back({prefix, trunk, at, std::min(end, at + SEGMENT)});
            }
        };
        const int first = plan.prefixes ? plan.prefix_starts[0] : plan.tokens;
        for (int c = 0; c < plan.chains && plan.starts[c] < first; ++c) cut(-1, 0, plan.starts[c], plan.starts[c + 1]);
        const int alone = plan.trunks ? plan.trunk_starts[0] : plan.prefixes;
        for (int p = 0; p < alone; ++p) cut(p, 0, plan.prefix_starts[p], plan.prefix_starts[p + 1]);
        for (int t = 0; t < plan.trunks; ++t) {
            const int p = plan.trunk_starts[t], end = plan.trunk_starts[t + 1];
            // Whole blocks of keys: a query's bits do not tell where others left it.
            cut(p, plan.trunk_lengths[t] / KEYS * KEYS, plan.prefix_starts[p], plan.prefix_starts[end]);
        }
    }

    // The prefixes of a segment's tokens: their trunk for all of them, the rest of each for its own.
    void read_prefixes(Member& me, int layer, int first_head, int heads, const Segment& segment, const Partial* results) {
        const auto read = [&](int prefix, int first_key, int end_key, int begin, int end) {
            if (first_key >= end_key || begin >= end) return;
            const int32_t* table = plan.prefix_tables + (size_t)prefix * plan.prefix_table_width;
            if (end - begin <= FEW)
                rows(me, layer, first_head, heads, table, first_key, end_key, begin, end, segment.begin, results);
            else
                panels(me, layer, first_head, heads, table, first_key, end_key, begin, end, segment.begin, results,
                       [&](int) { return end_key; });
        };
        read(segment.prefix, 0, segment.trunk, segment.begin, segment.end);
        int begin = segment.begin;
        for (int p = segment.prefix; begin < segment.end; ++p) {
            const int end = std::min(segment.end, plan.prefix_starts[p + 1]);
            read(p, segment.trunk, plan.prefix_lengths[p], begin, end);
            begin = end;
        }
    }

    void find_rows(const int32_t* table, int first, int end, Rows& rows) const {
        rows.n = std::min(KEYS, end - first);
        int in_block = first % plan.block_size;
        const int32_t* entry = table + first / plan.block_size;
        for (int i = 0; i < rows.n; ++i) {
            rows.offset[i] = ((size_t)*entry * plan.block_size + in_block) * kv_width;
            if (++in_block == plan.block_size) in_block = 0, ++entry;
        }
    }

    void point(int layer, int head, const Rows& rows, KeyBlock<T>& block) const {
        const size_t column = (size_t)(head / group) * D;
        const T *keys = (const T*)plan.keys[layer] + column, *values = (const T*)plan.values[layer] + column;
        block.n = rows.n;
        for (int i = 0; i < rows.n; ++i) block.keys[i] = keys + rows.offset[i], block.values[i] = values + rows.offset[i];
    }

    // Brings rows into the cache, of all heads of the unit: one head after the other reads small pieces far apart, which
    // takes three times as long from memory. (Prefetch instructions would not do: in such numbers they are dropped.)
    void touch(int layer, int head, int heads, const Rows& rows) const {
        const int first = head / group, last = (head + heads - 1) / group;
        const size_t column = (size_t)first * D, bytes = (size_t)(last - first + 1) * D * sizeof(T);
        for (const void* base : {plan.keys[layer], plan.values[layer]})
            for (int i = 0; i < rows.n; ++i) {
                const char* row = (const char*)((const T*)base + rows.offset[i] + column);
                for (size_t at = 0; at < bytes; at += 64) asm volatile("" ::"r"(*(const int32_t*)(row + at)));
            }
    }

    // Queries `begin` ... `end` over keys `first_key` ... `end_key` of a table, of which token t sees those before
    // `visible_at(t)`.
    template <class Visible>
    void panels(Member& me, int layer, int first_head, int heads, const int32_t* table, int first_key, int end_key,
                int begin, int end, int base, const Partial* results, const Visible& visible_at) {
        const int count = (end - begin + LANES - 1) / LANES;
        const size_t q_size = (size_t)D / STEP * LANES, o_size = (size_t)D * LANES;
        uint32_t* q = me.scratch[2].get<uint32_t>(q_size * PANELS * UNIT_HEADS);
        float* o = me.scratch[3].get<float>(o_size * PANELS * UNIT_HEADS);
        PanelState states[UNIT_HEADS * PANELS];
        int seen[SEGMENT];
        for (int i = 0; i < count * LANES; ++i) seen[i] = visible_at(std::min(begin + i, end - 1));
        for (int i = 0; i < heads * count; ++i) {
            const void *from[LANES], *before[LANES];
            const int first = begin + i % count * LANES, lanes = std::min(LANES, end - first);
            const Partial& result = results[i / count];
            for (int t = 0; t < LANES; ++t) {
                const int token = first + std::min(t, lanes - 1);
                from[t] = queries + (size_t)token * q_width + (first_head + i / count) * D;
                before[t] = result.o + (size_t)(token - base) * D;
                states[i].m[t] = result.m[token - base];
                states[i].l[t] = result.l[token - base];
            }
            states[i].o = o + i * o_size;
            rows_to_panel(from, LANES, D / STEP, q + i * q_size);
            rows_to_panel(before, LANES, D, (uint32_t*)states[i].o);
        }
        Rows rows;
        KeyBlock<T> block;
        for (int first = first_key; first < end_key; first += KEYS) {
            find_rows(table, first, end_key, rows);
            touch(layer, first_head, heads, rows);
            for (int h = 0; h < heads; ++h) {
                point(layer, first_head + h, rows, block);
                for (int p = 0; p < count; ++p) {
                    int in_block[LANES], most = 0, least = KEYS;
                    for (int t = 0; t < LANES; ++t) {
                        in_block[t] = seen[p * LANES + t] - first;
                        most = std::max(most, in_block[t]);
                        least = std::min(least, in_block[t]);
                    }
                    if (most > 0)
                        attend_panel(q + (h * count + p) * q_size, D, block, least < rows.n ? in_block : nullptr,
                                     m.score_scale, states[h * count + p]);
                }
            }
        }
        for (int i = 0; i < heads * count; ++i) {
            void* to[LANES];
            const int first = i % count * LANES + begin - base, lanes = std::min(LANES, end - base - first);
            const Partial& result = results[i / count];
            for (int t = 0; t < lanes; ++t) {
                to[t] = result.o + (size_t)(first + t) * D;
                result.m[first + t] = states[i].m[t];
                result.l[first + t] = states[i].l[t];
            }
            panel_to_rows((const uint32_t*)states[i].o, to, lanes, D);
        }
    }

    // The same for a few queries, which see all the keys.
    void rows(Member& me, int layer, int first_head, int heads, const int32_t* table, int first_key, int end_key, int begin,
              int end, int base, const Partial* results) const {
        const int count = end - begin, width = row_width<T>(D);
        float* o = me.scratch[7].get<float>(UNIT_HEADS * FEW * (MAX_HEAD + 2 * LANES));
        for (int i = 0; i < heads * count; ++i)
            from_row_order<T>(results[i / count].o + (size_t)(begin - base + i % count) * D, D, o + i * width);
        Rows rows;
        KeyBlock<T> block;
        for (int first = first_key; first < end_key; first += KEYS) {
            find_rows(table, first, end_key, rows);
            touch(layer, first_head, heads, rows);
            for (int h = 0; h < heads; ++h) {
                point(layer, first_head + h, rows, block);
                for (int t = 0; t < count; ++t) {
                    const T* q = queries + (size_t)(begin + t) * q_width + (first_head + h) * D;
                    const int at = begin - base + t;
                    attend_row(q, D, block, m.score_scale, results[h].m[at], results[h].l[at], o + (h * count + t) * width);
                }
            }
        }
        for (int i = 0; i < heads * count; ++i)
            row_order<T>(o + i * width, D, results[i / count].o + (size_t)(begin - base + i % count) * D);
    }

    // Both parts of up to 16 tokens by log-sum-exp, into `attended`. `at`: of the first of them in the partial results.
    void merge(int first, int lanes, int at, const Partial& own, const Partial* prefix, int head) const {
        alignas(64) float own_share[LANES], prefix_share[LANES];
        const F m2 = load(own.m + at), l2 = load(own.l + at);
        if (prefix == nullptr)
            store(own_share, set1(1.f) / l2);
        else {
            const F m1 = load(prefix->m + at), l1 = load(prefix->l + at), highest = max(m1, m2);
            const F a1 = exponential(m1 - highest), a2 = exponential(m2 - highest);
            const F inverse = set1(1.f) / fma(l1, a1, l2 * a2);
            store(prefix_share, a1 * inverse);
            store(own_share, a2 * inverse);
        }
        for (int t = 0; t < lanes; ++t) {
            T* to = attended + (size_t)(first + t) * q_width + head * D;
            alignas(64) float row[MAX_HEAD];
            for (int i = 0; i < D; i += LANES) {
                F out = load(own.o + (size_t)(at + t) * D + i) * set1(own_share[t]);
                if (prefix != nullptr) out = fma(load(prefix->o + (size_t)(at + t) * D + i), set1(prefix_share[t]), out);
                store(row + i, Precision<T>::round(out));
            }
            if constexpr (STEP == 1)
                memcpy(to, row, D * sizeof(float));
            else
                for (int i = 0; i < D; ++i) memcpy(to + i, (const char*)(row + i) + 2, 2);  // the upper half
        }
    }
};

// The forward of a dots1 model over the tokens of a plan, in one call.
//
// The residual stream lies in panels of 16 tokens, fp32 (holding bf16 values where the model is bf16); every product
// reads panels and its epilogue does the elementwise work that follows. Rows (one token after the other) appear where
// tokens are picked one by one: queries and outputs of attention, inputs and outputs of experts.
#include "attend.h"
#include "gemm.h"
#include "model.h"
#include "router.h"
#include "sampling.h"

namespace {

constexpr int ROWS = 32;          // weight rows of a unit of a product
constexpr int EXPERT_ROWS = BLOCK_PANELS * LANES;

struct ExpertUnit {
    int expert, begin, end;  // rows in expert order
};

template <class T>
class Forward {
    using P = Precision<T>;
    static constexpr int STEP = P::STEP;
    const ModelShape& m;
    const PlanArrays& plan;
    const int N, panels, H, D, heads, kv_heads, q_width;
    int block_panels, blocks;
    std::unique_ptr<Attention<T>> attention;
    std::vector<ExpertUnit> expert_units;
    std::vector<int32_t> chosen, places, order;  // [N, k] experts; [N, k] row of each choice; [N * k] choice of each row
    std::vector<float> gates;                    // [N, k]
    float *residual, *cosines, *sines;
    uint32_t *x, *attended_panels, *inner, *wanted;  // panels of steps
    T *x_rows, *queries, *attended, *expert_out;

  public:
    Forward(const ModelShape& m, const PlanArrays& plan, int threads, std::array<Buffer, 12>& memory)
        : m(m), plan(plan), N(plan.tokens), panels((N + LANES - 1) / LANES), H(m.hidden),
          D(m.head_dim), heads(m.heads), kv_heads(m.kv_heads), q_width(m.heads * m.head_dim) {
        blocks = std::max((panels + BLOCK_PANELS - 1) / BLOCK_PANELS, 1);
        block_panels = (panels + blocks - 1) / blocks;
        blocks = (panels + block_panels - 1) / block_panels;
        int64_t inner_width = 0;
        for (int l = 0; l < m.layers; ++l) inner_width = std::max(inner_width, m.layer[l].inner);
        const size_t lanes = (size_t)panels * LANES, choices = (size_t)N * m.top_k;
        residual = memory[0].get<float>(lanes * H);
        x = memory[1].get<uint32_t>(lanes * H / STEP);
        x_rows = memory[2].get<T>((size_t)N * H);
        queries = memory[3].get<T>((size_t)N * q_width);
        attended = memory[4].get<T>((size_t)N * q_width);
        attended_panels = memory[5].get<uint32_t>(lanes * q_width / STEP);
        inner = memory[6].get<uint32_t>(lanes * inner_width / STEP);
        expert_out = memory[7].get<T>(choices * H);
        cosines = memory[8].get<float>(lanes * D / 2);
        sines = memory[9].get<float>(lanes * D / 2);
        wanted = memory[10].get<uint32_t>((size_t)(plan.logits + LANES) * H / STEP);
        attention = std::make_unique<Attention<T>>(m, plan, threads, queries, attended);
        chosen.resize(choices);
        places.resize(choices);
        order.resize(choices);
        gates.resize(choices);
    }

    static int phases(const ModelShape& m) { return 4 + 10 * m.layers; }

    void run(Member& me) {
        embed(me);
        int moe = 0;
        for (int l = 0; l < m.layers; ++l) {
            const LayerWeights& w = m.layer[l];
            me.units(QKV, panels, [&](int p) { norm(p, (const T*)w.input_norm, panel_of(x, H, p)); });
            me.units(QKV, (heads + 2 * kv_heads) * blocks, [&](int u) { project(me, w, l, u / blocks, u % blocks); });
            me.units(ATTENTION, attention->units(), [&](int u) { attention->run(me, l, u); });
            me.units(OUTPUT, panels, [&](int p) { pack(attended, q_width, p, panel_of(attended_panels, q_width, p)); });
            me.units(OUTPUT, H / ROWS * blocks, [&](int u) { output(me, w, u / blocks * ROWS, u % blocks); });
            const int inner_units = (int)((w.inner + 15) / 16) * blocks;
            if (w.router == nullptr) {
                me.units(MLP, panels, [&](int p) { norm(p, (const T*)w.mlp_norm, panel_of(x, H, p)); });
                me.units(MLP, inner_units, [&](int u) { gate_up(me, w, u / blocks * 16, u % blocks); });
                me.units(MLP, H / ROWS * blocks, [&](int u) { down(me, w, u / blocks * ROWS, u % blocks, false); });
                continue;
            }
            me.units(ROUTER, panels, [&](int p) { route(me, w, p, moe); });
            me.single(ROUTER, [&] { sort_by_expert(); });
            const int num_experts = (int)expert_units.size();
            me.units(EXPERTS, inner_units + num_experts, [&](int u) {
                if (u < num_experts) return expert(me, w, expert_units[u]);
                gate_up(me, w, (u - num_experts) / blocks * 16, (u - num_experts) % blocks);
            });
            me.units(COMBINE, H / ROWS * blocks, [&](int u) { down(me, w, u / blocks * ROWS, u % blocks, true); });
            ++moe;
        }
        head(me);
    }

  private:
    // ------------------------------------------------------------------------------------------------ small helpers

    uint32_t* panel_of(uint32_t* base, int64_t width, int p) const { return base + (size_t)p * (width / STEP) * LANES; }
    float* residual_of(int p) const { return residual + (size_t)p * H * LANES; }
    int lanes_of(int p) const { return std::min(LANES, N - p * LANES); }
    int first_panel(int block) const { return block * block_panels; }
    int last_panel(int block) const { return std::min(panels, (block + 1) * block_panels); }
    int tokens_of(int block) const { return std::min(N, last_panel(block) * LANES) - first_panel(block) * LANES; }

    // Rows a, b of a panel in steps: fp32 one by one, bf16 as pairs.
    static INLINE void store_steps(uint32_t* steps, F a, F b) {
        if constexpr (STEP == 1) {
            store(steps, a);
            store(steps + LANES, b);
        } else
            store(steps, pair(a, b));
    }
    // In place: `count` (even) rows of 16 floats, rounded already, become steps.
    static void to_steps(float* c, int count) {
        if (STEP == 1) return;
        for (int i = 0; i < count; i += 2)
            store((uint32_t*)c + i / 2 * LANES, pair(load(c + i * LANES), load(c + (i + 1) * LANES)));
    }
    static F weight_of(const T* w, int i) { return set1(to_float(w[i])); }

    void pack(const T* rows, int width, int p, uint32_t* panel) const {
        const void* from[LANES];
        for (int t = 0; t < lanes_of(p); ++t) from[t] = rows + (size_t)(p * LANES + t) * width;
        rows_to_panel(from, lanes_of(p), width / STEP, panel);
    }

    // ------------------------------------------------------------------------------------------------------- layers

    void embed(Member& me) {
        me.units(EMBED, panels, [&](int p) {
            const void *rows[LANES], *cos_rows[LANES], *sin_rows[LANES];
            const int lanes = lanes_of(p);
            for (int t = 0; t < lanes; ++t) {
                rows[t] = (const T*)m.embedding + (size_t)plan.ids[p * LANES + t] * H;
                cos_rows[t] = plan.cosines + (size_t)plan.position[p * LANES + t] * (D / 2);
                sin_rows[t] = plan.sines + (size_t)plan.position[p * LANES + t] * (D / 2);
            }
            rows_to_panel(cos_rows, lanes, D / 2, (uint32_t*)cosines + (size_t)p * D / 2 * LANES);
            rows_to_panel(sin_rows, lanes, D / 2, (uint32_t*)sines + (size_t)p * D / 2 * LANES);
            uint32_t* steps = STEP == 1 ? (uint32_t*)residual_of(p) : panel_of(x, H, p);
            rows_to_panel(rows, lanes, H / STEP, steps);
            if (STEP == 2)
                for (int i = 0; i < H / 2; ++i) {
                    const I pairs = load_ints<LANES>(steps + i * LANES);
                    store(residual_of(p) + 2 * i * LANES, even(pairs));
                    store(residual_of(p) + (2 * i + 1) * LANES, odd(pairs));
                }
        });
    }

    static F inverse_root_mean_square(const float* rows, int count, float eps) {
        F sums[4] = {set1(0.f), set1(0.f), set1(0.f), set1(0.f)};
        for (int i = 0; i < count; i += 4)
            for (int j = 0; j < 4; ++j) sums[j] = fma(load(rows + (i + j) * LANES), load(rows + (i + j) * LANES), sums[j]);
        const F mean = ((sums[0] + sums[2]) + (sums[1] + sums[3])) * set1(1.f / count);
        return set1(1.f) / square_root(mean + set1(eps));
    }

    // RMSNorm of a panel of the residual stream into steps, and into fp32 rows where the router wants them.
    void norm(int p, const T* weight, uint32_t* steps, float* fp32 = nullptr) const {
        const float* rows = residual_of(p);
        const F scale = inverse_root_mean_square(rows, H, m.eps);
        for (int i = 0; i < H; i += 2) {
            const F a = P::round(P::round(load(rows + i * LANES) * scale) * weight_of(weight, i));
            const F b = P::round(P::round(load(rows + (i + 1) * LANES) * scale) * weight_of(weight, i + 1));
            store_steps(steps + i / STEP * LANES, a, b);
            if (fp32 != nullptr) {
                store(fp32 + i * LANES, a);
                store(fp32 + (i + 1) * LANES, b);
            }
        }
    }

    // One head's queries, keys or values of a block of tokens: product, norm, rotation, and home.
    void project(Member& me, const LayerWeights& w, int layer, int head, int block) {
        const bool is_q = head < heads, is_k = !is_q && head < heads + kv_heads;
        const int kv_head = is_q ? head : is_k ? head - heads : head - heads - kv_heads;
        const T* weight = (const T*)(is_q ? w.q : is_k ? w.k : w.v) + (size_t)kv_head * D * H;
        float* c = me.scratch[0].get<float>((size_t)BLOCK_PANELS * D * LANES);
        const int first = first_panel(block);
        gemm(weight, H, D, panel_of(x, H, first), (size_t)H / STEP * LANES, tokens_of(block), c, (size_t)D * LANES);
        for (int p = first; p < last_panel(block); ++p) {
            float* rows = c + (size_t)(p - first) * D * LANES;
            for (int i = 0; i < D; ++i) store(rows + i * LANES, P::round(load(rows + i * LANES)));
            if (is_q || is_k) rotate(rows, (const T*)(is_q ? w.q_norm : w.k_norm), p);
            to_steps(rows, D);
            void* to[LANES];
            T* cache = (T*)(is_k ? plan.keys : plan.values)[layer];
            for (int t = 0; t < lanes_of(p); ++t) {
                const int token = p * LANES + t;
                to[t] = is_q ? queries + (size_t)token * q_width + head * D
                             : cache + (attention->slots[token] * kv_heads + kv_head) * D;
            }
            panel_to_rows((uint32_t*)rows, to, lanes_of(p), D / STEP);
        }
    }

    void rotate(float* rows, const T* weight, int p) const {
        const F scale = inverse_root_mean_square(rows, D, m.eps);
        const int half = D / 2;
        const float *cosine = cosines + (size_t)p * half * LANES, *sine = sines + (size_t)p * half * LANES;
        for (int i = 0; i < half; ++i) {
            float *low = rows + i * LANES, *high = rows + (i + half) * LANES;
            const F a = P::round(P::round(load(low) * scale) * weight_of(weight, i));
            const F b = P::round(P::round(load(high) * scale) * weight_of(weight, i + half));
            const F cos = load(cosine + i * LANES), sin = load(sine + i * LANES);
            store(low, P::round(P::round(a * cos) - P::round(b * sin)));
            store(high, P::round(P::round(b * cos) + P::round(a * sin)));
        }
    }

    // residual += attention's output product, weight rows `row` ... `row + ROWS`.
    void output(Member& me, const LayerWeights& w, int row, int block) {
        float* c = me.scratch[0].get<float>(BLOCK_PANELS * ROWS * LANES);
        const int first = first_panel(block);
        gemm((const T*)w.o + (size_t)row * q_width, q_width, ROWS, panel_of(attended_panels, q_width, first),
             (size_t)q_width / STEP * LANES, tokens_of(block), c, ROWS * LANES);
        for (int p = first; p < last_panel(block); ++p)
            for (int i = 0; i < ROWS; ++i) {
                float* at = residual_of(p) + (size_t)(row + i) * LANES;
                store(at, P::round(load(at) + P::round(load(c + ((p - first) * ROWS + i) * LANES))));
            }
    }

    // SwiGLU of rows of 16 gates and ups into steps.
    static void swiglu(const float* gates, const float* ups, int count, uint32_t* steps) {
        for (int i = 0; i < count; i += 2) {
            F out[2];
            for (int j = 0; j < 2; ++j) {
                const F gate = P::round(load(gates + (i + j) * LANES)), up = P::round(load(ups + (i + j) * LANES));
                out[j] = P::round(P::round(silu(gate)) * up);
            }
            store_steps(steps + i / STEP * LANES, out[0], out[1]);
        }
    }

    // The dense MLP's or shared experts' hidden units `row` ... `row + 16`.
    void gate_up(Member& me, const LayerWeights& w, int row, int block) {
        float* c = me.scratch[0].get<float>(2 * BLOCK_PANELS * 16 * LANES);
        float* ups = c + BLOCK_PANELS * 16 * LANES;
        const int first = first_panel(block), count = std::min<int>(16, w.inner - row);
        const size_t x_panel = (size_t)H / STEP * LANES, at = (size_t)row * H;
        gemm((const T*)w.gate + at, H, count, panel_of(x, H, first), x_panel, tokens_of(block), c, 16 * LANES);
        gemm((const T*)w.up + at, H, count, panel_of(x, H, first), x_panel, tokens_of(block), ups, 16 * LANES);
        for (int p = first; p < last_panel(block); ++p)
            swiglu(c + (p - first) * 16 * LANES, ups + (p - first) * 16 * LANES, count,
                   panel_of(inner, w.inner, p) + row / STEP * LANES);
    }

    // residual += the down product (+ the routed experts' weighted sum), weight rows `row` ... `row + ROWS`.
    void down(Member& me, const LayerWeights& w, int row, int block, bool with_experts) {
        float* c = me.scratch[0].get<float>(BLOCK_PANELS * ROWS * LANES);
        const int first = first_panel(block);
        gemm((const T*)w.down + (size_t)row * w.inner, w.inner, ROWS, panel_of(inner, w.inner, first),
             (size_t)w.inner / STEP * LANES, tokens_of(block), c, ROWS * LANES);
        alignas(64) float routed[ROWS * LANES];
        for (int p = first; p < last_panel(block); ++p) {
            if (with_experts) combine(p, row, routed);
            for (int i = 0; i < ROWS; ++i) {
                float* at = residual_of(p) + (size_t)(row + i) * LANES;
                F out = P::round(load(c + ((p - first) * ROWS + i) * LANES));
                if (with_experts) out = P::round(load(routed + i * LANES) + out);
                store(at, P::round(load(at) + out));
            }
        }
    }

    // routed [ROWS][16]: the weighted sums of the experts' outputs, features `row` ... `row + ROWS`.
    void combine(int p, int row, float* routed) const {
        alignas(64) float rows[LANES][ROWS];
        const void* from[LANES];
        for (int t = 0; t < lanes_of(p); ++t) {
            F a = set1(0.f), b = set1(0.f);
            const size_t token = p * LANES + t;
            for (int j = 0; j < m.top_k; ++j) {
                const T* out = expert_out + (size_t)places[token * m.top_k + j] * H + row;
                const F gate = set1(gates[token * m.top_k + j]);
                if constexpr (STEP == 1) {
                    a = fma(load(out), gate, a);
                    b = fma(load(out + LANES), gate, b);
                } else {
                    const I pairs = load_ints<LANES>(out);
                    a = fma(even(pairs), gate, a);
                    b = fma(odd(pairs), gate, b);
                }
            }
            store_steps((uint32_t*)rows[t], P::round(a), P::round(b));
            from[t] = rows[t];
        }
        rows_to_panel(from, lanes_of(p), ROWS / STEP, (uint32_t*)routed);
        if (STEP == 2)
            for (int i = ROWS / 2 - 1; i >= 0; --i) {
                const I pairs = load_ints<LANES>(routed + i * LANES);
                store(routed + (2 * i + 1) * LANES, odd(pairs));
                store(routed + 2 * i * LANES, even(pairs));
            }
    }

    // ------------------------------------------------------------------------------------------------------ experts

    void route(Member& me, const LayerWeights& w, int p, int moe) {
        float* fp32 = me.scratch[4].get<float>((size_t)H * LANES);
        uint32_t* steps = panel_of(x, H, p);
        norm(p, (const T*)w.mlp_norm, steps, fp32);
        void* rows[LANES];
        const int lanes = lanes_of(p), k = m.top_k;
        for (int t = 0; t < lanes; ++t) rows[t] = x_rows + (size_t)(p * LANES + t) * H;
        panel_to_rows(steps, rows, lanes, H / STEP);
        float* scores = me.scratch[5].get<float>(2 * (size_t)m.experts * LANES);
        router_scores(w.router, m.router_bf16, m.experts, H, fp32, scores, me.scratch[6]);
        choose_experts(scores, (const float*)w.correction_bias, m.experts, k, lanes, m.normalise_gates, m.gate_scale,
                       &chosen[(size_t)p * LANES * k], &gates[(size_t)p * LANES * k]);
        if (plan.out_routes == nullptr) return;
        int moe_layers = 0;
        for (int l = 0; l < m.layers; ++l) moe_layers += m.layer[l].router != nullptr;
        for (int t = p * LANES; t < p * LANES + lanes; ++t)
            for (int j = 0; j < k; ++j)
                plan.out_routes[((size_t)t * moe_layers + moe) * k + j] = (uint8_t)chosen[(size_t)t * k + j];
    }

    void sort_by_expert() {
        std::vector<int> next(m.experts + 1, 0);
        for (int32_t e : chosen) ++next[e + 1];
        for (int e = 0; e < m.experts; ++e) next[e + 1] += next[e];
        expert_units.clear();
        for (int e = 0; e < m.experts; ++e) {
            const int rows = next[e + 1] - next[e], parts = (rows + EXPERT_ROWS - 1) / EXPERT_ROWS;
            for (int part = 0; part < parts; ++part) {
                const int size = ((rows + parts - 1) / parts + LANES - 1) / LANES * LANES;
                const int begin = next[e] + std::min(rows, part * size), end = next[e] + std::min(rows, (part + 1) * size);
                if (begin < end) expert_units.push_back({e, begin, end});
            }
        }
        std::stable_sort(expert_units.begin(), expert_units.end(), [](const ExpertUnit& a, const ExpertUnit& b) {
            return a.end - a.begin > b.end - b.begin;  // the longest first: what is left at the end is short
        });
        for (size_t i = 0; i < chosen.size(); ++i) {
            places[i] = next[chosen[i]]++;
            order[places[i]] = (int32_t)i;
        }
    }

    void expert(Member& me, const LayerWeights& w, const ExpertUnit& unit) {
        const int rows = unit.end - unit.begin, count = (rows + LANES - 1) / LANES, inner_width = m.expert_inner;
        const size_t x_panel = (size_t)H / STEP * LANES, inner_panel = (size_t)inner_width / STEP * LANES;
        uint32_t* in = me.scratch[2].get<uint32_t>(count * x_panel);
        uint32_t* hidden = me.scratch[3].get<uint32_t>(count * inner_panel);
        float* c = me.scratch[0].get<float>(BLOCK_PANELS * ROWS * LANES);
        for (int p = 0; p < count; ++p) {
            const void* from[LANES];
            const int lanes = std::min(LANES, rows - p * LANES);
            for (int t = 0; t < lanes; ++t)
                from[t] = x_rows + (size_t)(order[unit.begin + p * LANES + t] / m.top_k) * H;
            rows_to_panel(from, lanes, H / STEP, in + p * x_panel);
        }
        const T* gate = (const T*)w.experts_gate_up + (size_t)unit.expert * 2 * inner_width * H;
        const T* up = gate + (size_t)inner_width * H;
        for (int i = 0; i < inner_width; i += 8) {  // gates and ups in turn: each brings its own next rows
            float* ups = c + BLOCK_PANELS * 8 * LANES;
            gemm(gate + (size_t)i * H, H, 8, in, x_panel, rows, c, 8 * LANES);
            gemm(up + (size_t)i * H, H, 8, in, x_panel, rows, ups, 8 * LANES);
            for (int p = 0; p < count; ++p)
                swiglu(c + p * 8 * LANES, ups + p * 8 * LANES, 8, hidden + p * inner_panel + i / STEP * LANES);
        }
        const T* down = (const T*)w.experts_down + (size_t)unit.expert * H * inner_width;
        for (int row = 0; row < H; row += ROWS) {
            gemm(down + (size_t)row * inner_width, inner_width, ROWS, hidden, inner_panel, rows, c, ROWS * LANES);
            for (int p = 0; p < count; ++p) {
                void* to[LANES];
                const int lanes = std::min(LANES, rows - p * LANES);
                for (int t = 0; t < lanes; ++t) to[t] = expert_out + (size_t)(unit.begin + p * LANES + t) * H + row;
                float* out = c + p * ROWS * LANES;
                for (int i = 0; i < ROWS; ++i) store(out + i * LANES, P::round(load(out + i * LANES)));
                to_steps(out, ROWS);
                panel_to_rows((const uint32_t*)out, to, lanes, ROWS / STEP);
            }
        }
    }

    // --------------------------------------------------------------------------------------------------------- head

    // Final norm and head of the tokens whose logits are wanted.
    void head(Member& me) {
        constexpr int VOCAB_ROWS = 64;
        const int M = plan.logits, out_panels = (M + LANES - 1) / LANES;
        const size_t panel = (size_t)H / STEP * LANES;
        me.units(HEAD, panels, [&](int p) { norm(p, (const T*)m.final_norm, panel_of(x, H, p)); });
        me.units(HEAD, out_panels, [&](int p) {
            const int lanes = std::min(LANES, M - p * LANES);
            for (int t = 0; t < LANES; ++t) {
                const int token = plan.logits_at[p * LANES + (t < lanes ? t : 0)];
                const uint32_t* from = panel_of(x, H, token / LANES) + token % LANES;
                for (int i = 0; i < H / STEP; ++i) wanted[p * panel + (size_t)i * LANES + t] = from[(size_t)i * LANES];
            }
        });
        const int out_blocks = (out_panels + BLOCK_PANELS - 1) / BLOCK_PANELS;
        const int chunks = (m.vocab + VOCAB_ROWS - 1) / VOCAB_ROWS;
        me.units(HEAD, chunks * out_blocks, [&](int u) {
            const int row = u / out_blocks * VOCAB_ROWS, first = u % out_blocks * BLOCK_PANELS;
            const int rows = std::min(VOCAB_ROWS, m.vocab - row), tokens = std::min(M - first * LANES, BLOCK_PANELS * LANES);
            float* c = me.scratch[0].get<float>(BLOCK_PANELS * VOCAB_ROWS * LANES);
            gemm((const T*)m.head + (size_t)row * H, H, rows, wanted + first * panel, panel, tokens, c, VOCAB_ROWS * LANES);
            for (int p = 0; p * LANES < tokens; ++p) {
                float* out = c + p * VOCAB_ROWS * LANES;
                for (int i = 0; i < rows; ++i) store(out + i * LANES, P::round(load(out + i * LANES)));
                void* to[LANES];
                const int lanes = std::min(LANES, tokens - p * LANES);
                for (int t = 0; t < lanes; ++t)
                    to[t] = plan.out_logits + (size_t)((first + p) * LANES + t) * m.vocab + row;
                panel_to_rows((const uint32_t*)out, to, lanes, rows);
            }
        });
    }
};

struct Engine {
    ModelShape shape;
    std::vector<LayerWeights> layers;
    OpenMP openmp;
    Team team;
    std::array<Buffer, 12> memory;
};

template <class T>
void forward(Engine& engine, const PlanArrays& plan, int threads) {
    Forward<T> work(engine.shape, plan, threads, engine.memory);
    run_team(engine.team, engine.openmp, threads, Forward<T>::phases(engine.shape), [&](Member& me) { work.run(me); });
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT Engine* dots_native_create(const ModelShape* shape, void* parallel, void* num_threads) {
    Engine* engine = new Engine;
    engine->shape = *shape;
    engine->layers.assign(shape->layer, shape->layer + shape->layers);
    engine->shape.layer = engine->layers.data();
    engine->openmp = {(decltype(OpenMP::parallel))parallel, (decltype(OpenMP::num_threads))num_threads};
    return engine;
}

EXPORT void dots_native_destroy(Engine* engine) { delete engine; }

EXPORT void dots_native_forward(Engine* engine, const PlanArrays* plan, int threads) {
    engine->shape.bf16 ? forward<bf16>(*engine, *plan, threads) : forward<float>(*engine, *plan, threads);
}

EXPORT void dots_native_sample(Engine* engine, const SamplingArrays* arrays, int threads) {
    run_team(engine->team, engine->openmp, threads, 1, [&](Member& me) {
        me.units(SAMPLING, arrays->rows, [&](int row) { sample_row(*arrays, row, me.scratch[0]); });
    });
}

// seconds [PHASES] since the last call.
EXPORT void dots_native_profile(Engine* engine, double* seconds) {
    memcpy(seconds, engine->team.seconds, sizeof engine->team.seconds);
    memset(engine->team.seconds, 0, sizeof engine->team.seconds);
}
}

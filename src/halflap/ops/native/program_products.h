// The linear maps of a program (program.cpp), each with a norm before it and an activation, gate or sum behind it.
#pragma once
#include "few_rows.h"
#include "packed_rows.h"
#include "program.h"
#include <type_traits>
#include <vector>

namespace halflap {
namespace program {

enum Activation { LINEAR, SQUARED_RELU, SILU };

// to (+)= activation(weight norm(from) + bias); with `gated` weight norm(from) * activation(beside)
struct Product : Instruction {
    Place from, to, beside;
    Norm norm;
    int64_t inputs, outputs, format, group, narrow_scales, activation, gated, adds;  // format: bits of a weight, or E4M3
    const void *weight, *scales;
    const float* bias;
};

LANES vf activate(int64_t activation, vf x) {
    if (activation == SILU) return silu<float>(x);
    if (activation != SQUARED_RELU) return x;
    const vf positive = maximum(x, splat(0));
    return positive * positive;
}

// What one thread has prepared of a product's input; good until values that it depends on may change
struct Prepared {
    int64_t waits = -1, column = 0, offset = 0, format = 0;
    const float* gain = nullptr;
    bool holds(const Product& p, int64_t now) const {
        return waits == now && column == p.from.column && offset == p.from.offset && format == p.format && gain == p.norm.gain;
    }
};

inline int64_t product_grain(const Product& p, const Run& run) {
    const int64_t bytes = 1 + p.inputs * p.format / 8, share = p.outputs / (4 * run.threads);
    const int64_t enough = 32768 / bytes;  // below this, handing out a task costs more than it saves
    return round_up((share > enough ? share : enough) + 1, 16);
}

inline int64_t tasks(const Product& p, const Run& run) {
    const int64_t grain = product_grain(p, run);
    return (p.outputs + grain - 1) / grain;
}

template <class Rows, class Range>
inline void product(const Product& p, const Run& run, Prepared& prepared, int64_t now, const Range& range) {
    const int64_t M = run.batch, K = p.inputs, floats = round_up(Rows::floats(M, K), 16);
    float* memory = scratch(floats + M * K);  // of equal size, and so undisturbed, for products of the same input
    const bool fresh = !prepared.holds(p, now);
    if (fresh) prepared = {now, p.from.column, p.from.offset, p.format, p.norm.gain};
    const float* x = p.from.of(run, 0);
    int64_t stride = p.from.stride;
    if (fresh && p.norm.kind != NONE) {
        float* normed = memory + floats;
        for (int64_t m = 0; m < M; m++) p.norm.apply(p.from.of(run, m), K, normed + m * K);
        x = normed, stride = K;
    }
    const Rows rows = fresh ? Rows(M, K, x, stride, memory) : Rows(M, K, memory);
    range(rows);
}

inline void work(const Product& p, const Run& run, int64_t task, Prepared& prepared, int64_t now) {
    const int64_t grain = product_grain(p, run), begin = task * grain, end = begin + grain < p.outputs ? begin + grain : p.outputs;
    auto put = [&](int64_t m, int64_t n, const float* values, int64_t count) {
        float* y = p.to.of(run, m) + n;
        const float* beside = p.gated ? p.beside.of(run, m) + n : nullptr;
        for (int64_t i = 0; i < count; i += VL) {
            const int64_t left = count - i;
            vf v = load_to(values + i, left);
            if (p.bias) v += load_to(p.bias + n + i, left);
            v = beside ? v * activate(p.activation, load_to(beside + i, left)) : activate(p.activation, v);
            if (p.adds) v += load_to(y + i, left);
            store_to(y + i, v, left);
        }
    };
    auto floats = [&](auto* weight) {
        using W = std::remove_const_t<std::remove_pointer_t<decltype(weight)>>;
        product<FewRows<W>>(p, run, prepared, now, [&](const auto& rows) { rows.range(weight + begin * p.inputs, begin, end, put); });
    };
    const Weights packed{p.outputs, p.inputs, p.group, p.narrow_scales, (const uint32_t*)p.weight, p.scales};
    auto whole = [&](auto bits) {
        using Rows = PackedRows<decltype(bits)::value>;
        static thread_local std::vector<float> scales;
        if ((int64_t)scales.size() < Rows::scale_floats(packed)) scales.resize(Rows::scale_floats(packed));
        product<Rows>(p, run, prepared, now, [&](const auto& rows) { rows.range(packed, begin, end, scales.data(), put); });
    };
    switch (p.format) {
        case 4: return whole(std::integral_constant<int, 4>());
        case 8: return whole(std::integral_constant<int, 8>());
        case E4M3: return whole(std::integral_constant<int, E4M3>());
        case 16: return floats((const bf16*)p.weight);
        default: return floats((const float*)p.weight);
    }
}

}  // namespace program
}  // namespace halflap

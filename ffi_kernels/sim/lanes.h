// Templates that lift a function of scalars to 32 lanes: results are computed for all lanes (loops vectorise), then
// written under the mask.
#pragma once

#include <tuple>
#include <utility>

#include "decode.h"

namespace dsv4::sim {

// How a C++ type sits in a register: 16 bits and less zero-extended in a 32-bit slot.
template <class T, size_t N = sizeof(T)> struct SlotOf { using type = uint32_t; };
template <class T> struct SlotOf<T, 8> { using type = uint64_t; };
template <class T> using Slot = typename SlotOf<T>::type;

template <class T> inline T from_slot(Slot<T> s) {
  if constexpr (std::is_integral_v<T>) return static_cast<T>(s);
  else if constexpr (sizeof(T) == sizeof(Slot<T>)) { T v; std::memcpy(&v, &s, sizeof v); return v; }
  else { T v; const uint16_t h = static_cast<uint16_t>(s); std::memcpy(&v, &h, sizeof v); return v; }
}
template <class T> inline Slot<T> to_slot(T v) {
  if constexpr (std::is_integral_v<T>) return static_cast<Slot<T>>(static_cast<std::make_unsigned_t<T>>(v));
  else if constexpr (sizeof(T) == sizeof(Slot<T>)) { Slot<T> s; std::memcpy(&s, &v, sizeof v); return s; }
  else { uint16_t h; std::memcpy(&h, &v, sizeof v); return h; }
}

// d = F::f(s...)
template <class F, class D, class... S, size_t... I>
inline Step map_lanes(Ctx& c, const Instr& in, std::index_sequence<I...>) {
  const std::tuple<const Slot<S>*...> s{src<Slot<S>>(c, in, 1 + static_cast<int>(I))...};
  alignas(64) Slot<D> r[32];
  for (int l = 0; l < 32; ++l) r[l] = to_slot<D>(F::f(from_slot<S>(std::get<I>(s)[l])...));
  put(out<Slot<D>>(c, in, 0), r, c.mask);
  return Step::next;
}
template <class F, class D, class... S>
Step map(Ctx& c, const Instr& in) {
  return map_lanes<F, D, S...>(c, in, std::index_sequence_for<S...>{});
}
// The same, where the instruction's fields a, b, c take part: F::f(in, s...)
template <class F, class D, class... S, size_t... I>
inline Step map_lanes_with(Ctx& c, const Instr& in, std::index_sequence<I...>) {
  const std::tuple<const Slot<S>*...> s{src<Slot<S>>(c, in, 1 + static_cast<int>(I))...};
  alignas(64) Slot<D> r[32];
  for (int l = 0; l < 32; ++l) r[l] = to_slot<D>(F::f(in, from_slot<S>(std::get<I>(s)[l])...));
  put(out<Slot<D>>(c, in, 0), r, c.mask);
  return Step::next;
}
template <class F, class D, class... S>
Step map_with(Ctx& c, const Instr& in) {
  return map_lanes_with<F, D, S...>(c, in, std::index_sequence_for<S...>{});
}

// Handlers of F for the integer type `t`: F takes N values of T and gives one of T.
template <class F, class T, size_t... I> constexpr Handler same_types(std::index_sequence<I...>) { return &map<F, T, std::enable_if_t<(I >= 0), T>...>; }
template <class F, class T, int N> constexpr Handler same() { return same_types<F, T>(std::make_index_sequence<N>{}); }
template <class F, int N>
Handler by_integer(Decode& d, Type t) {
  switch (t) {
    case Type::u16: case Type::b16: return same<F, uint16_t, N>();
    case Type::s16: return same<F, int16_t, N>();
    case Type::u32: case Type::b32: return same<F, uint32_t, N>();
    case Type::s32: return same<F, int32_t, N>();
    case Type::u64: case Type::b64: return same<F, uint64_t, N>();
    case Type::s64: return same<F, int64_t, N>();
    default: d.wrong(std::string("type .") + name_of(t) + " is not modelled here");
  }
}

}  // namespace dsv4::sim

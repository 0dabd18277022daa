// From a statement to an executable instruction: modifiers are consumed one by one, operands become slots.
// Whatever is left over is an error that names it.
#pragma once

#include <initializer_list>
#include <unordered_map>

#include "machine.h"

namespace dsv4::sim {

class Decode {
 public:
  Decode(Function& f, const Module& m, const Raw& raw) : f(f), m(m), raw(raw), used_(raw.mods.size(), false) {}
  // Modifiers.
  bool take(const std::string& mod);                      // true if it is there; consumes it
  int choose(std::initializer_list<const char*> names);   // index of the one that is there, -1 if none
  int must(std::initializer_list<const char*> names);     // index; a sentence if there is none
  Type type();                                            // the next type; a sentence if there is none
  Type maybe_type();
  void ignore(std::initializer_list<const char*> names) { for (const char* n : names) take(n); }
  std::string first() const;                              // the first modifier not yet consumed
  [[noreturn]] void wrong(const std::string& what) const;
  // Operands, in the order in which the handler numbers them.
  const Arg& arg(size_t i) const;
  size_t args() const { return raw.args.size(); }
  void dst(size_t i, Type t) { dst(arg(i), t); }
  void src(size_t i, Type t) { src(arg(i), t); }
  void dst(const Arg& a, Type t);       // a sink gets a register nobody reads
  void src(const Arg& a, Type t);       // registers, numbers, special registers, addresses of variables
  bool wide(const Arg& a);              // src of a 32- or 64-bit address; true if it has 64 bits
  bool memory(size_t i);                // src of the base of [..]; imm becomes the offset; true if it has 64 bits
  void finish();                        // nothing may be left over
  void constant(uint64_t value, Type t);
  int32_t hidden(Type t);               // a fresh register
  void slot(int32_t s) { slots.push_back(s); }
  template <class T> T* extra() { auto p = std::make_shared<T>(); f.extras.push_back(p); in.extra = p.get(); return p.get(); }

  Function& f;
  const Module& m;
  const Raw& raw;
  Instr in;
  std::vector<int32_t> slots;
  struct Prelude { Instr in; std::vector<int32_t> slots; };
  std::vector<Prelude> before;  // instructions that prepare operands
  std::map<std::pair<uint64_t, int>, int32_t>* pool = nullptr;

 private:
  std::vector<bool> used_;
  std::vector<bool> used_args_;
  int32_t builtin(Builtin what, int64_t add, bool wide);
  const Variable* module_variable(const std::string& name) const;
};

using Decoder = void (*)(Decode&);
using Decoders = std::unordered_map<std::string, Decoder>;
// Each family adds its opcodes.
void add_integer(Decoders&);
void add_logic(Decoders&);
void add_compare(Decoders&);
void add_float(Decoders&);
void add_half(Decoders&);
void add_convert(Decoders&);
void add_control(Decoders&);
void add_memory(Decoders&);
void add_atomic(Decoders&);
void add_warp_ops(Decoders&);
void add_sync(Decoders&);
void add_mbarrier(Decoders&);
void add_async(Decoders&);
void add_cluster(Decoders&);
void add_matrix(Decoders&);
void add_wgmma(Decoders&);
void add_tcgen05(Decoders&);

// Branches of opcodes that live in another file.
Space space_of(Decode& d);       // memory.cpp: consumes .global, .shared::cta, ..., with the modifiers of order, scope and cache
void store_async(Decode& d);     // cluster.cpp
void reduce_async(Decode& d);
void cluster_barrier(Decode& d);
void warp_barrier(Decode& d);    // warp_ops.cpp
void async_copy(Decode& d);      // async.cpp: cp.async
void bulk_copy(Decode& d, bool reduce);  // bulk.cpp: cp.async.bulk, cp.reduce.async.bulk
void tensor_copy(Decode& d, bool reduce, bool prefetch);  // tma.cpp

std::vector<bool> product_registers(const Function& f);             // wgmma.cpp: by register, those of wgmma products and their copies
void guard_products(Decode& d, const std::vector<bool>& registers);  // an access of them waits for products that are not done

inline bool wide_type(Type t) { return bits_of(t) > 32; }

}  // namespace dsv4::sim

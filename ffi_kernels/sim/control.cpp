// Control flow: branches, calls, exits, and the instructions that only hint. PTX ISA 9.7.12, 9.7.19.
#include "decode.h"

namespace dsv4::sim {

Step fell_off(Ctx&, const Instr&) { fail("control runs off the end of the function"); }

namespace {
Step bra(Ctx& c, const Instr& in) {
  c.blocked = c.mask;
  c.target = static_cast<int32_t>(in.imm);
  return Step::jump;
}

Step brx(Ctx& c, const Instr& in) {
  const auto& targets = *static_cast<const std::vector<int32_t>*>(in.extra);
  const uint32_t* index = src<uint32_t>(c, in, 0);
  const int first = __builtin_ctz(c.mask);
  if (index[first] >= targets.size()) fail("branch index %u of a table of %zu targets", index[first], targets.size());
  uint32_t same = 0;
  for (int l = 0; l < 32; ++l) if (c.mask >> l & 1 && index[l] == index[first]) same |= 1u << l;
  c.blocked = same;
  c.stay = c.mask & ~same;
  c.target = targets[index[first]];
  return Step::jump;
}

Step call(Ctx&, const Instr&) { return Step::call; }
Step call_outside(Ctx&, const Instr& in) {
  const auto& name = *static_cast<const std::string*>(in.extra);
  if (name == "__assertfail") fail("an assert() of the kernel has failed");
  fail("the called function '%s' has no body in this module", name.c_str());
}
Step ret(Ctx&, const Instr&) { return Step::ret; }
Step exit_(Ctx&, const Instr&) { return Step::exit; }
Step trap(Ctx&, const Instr&) { fail("the kernel executes 'trap': one of its own checks has failed"); }
Step nothing(Ctx&, const Instr&) { return Step::next; }

// Launches do not overlap here; what a lane may touch before it waits is checked where addresses are (address.cpp).
Step wait_for_launch(Ctx& c, const Instr&) {
  c.warp->waited |= c.mask;
  c.machine->waited = true;
  return Step::next;
}
Step let_next_start(Ctx& c, const Instr&) {
  if (c.machine->launch.late && (c.mask & ~c.warp->waited)) {
    fail("executes griddepcontrol.launch_dependents before griddepcontrol.wait, but its launch is late: the next one counts on what was written before it");
  }
  return Step::next;
}
Step sleep_(Ctx&, const Instr&) { return Step::yield; }

void decode_call(Decode& d) {
  d.take("uni");
  size_t i = 0;
  const Arg* returns = nullptr;
  if (d.args() && d.arg(0).kind == Arg::list) returns = &d.arg(i++);
  const Arg& name = d.arg(i++);
  if (name.kind != Arg::symbol) d.wrong("calls through a pointer are not modelled");
  const Arg* params = i < d.args() ? &d.arg(i++) : nullptr;
  const auto it = d.m.functions.find(name.text);
  if (it == d.m.functions.end() || it->second->external) {
    *d.extra<std::string>() = name.text;
    d.in.run = call_outside;
    return;
  }
  const Function& callee = *it->second;
  const auto pass = [&](const Arg* list, const std::vector<Variable>& formals) {
    const size_t n = list ? list->parts.size() : 0;
    if (n != formals.size()) d.wrong("passes " + std::to_string(n) + " parameters where '" + callee.name + "' declares " + std::to_string(formals.size()));
    for (size_t k = 0; k < n; ++k) {
      const Arg& a = list->parts[k];
      if (a.kind != Arg::symbol || a.real_bits != 1 + static_cast<int>(Space::param)) d.wrong("parameters are passed as .param variables");
      if (a.value + formals[k].size > d.f.param_bytes) d.wrong("a parameter is smaller than the function declares");
      d.slot(static_cast<int32_t>(a.value));
    }
  };
  pass(returns, callee.returns);
  pass(params, callee.params);
  d.in.extra = &callee;
  d.f.callees.push_back(&callee);
  d.in.run = call;
}

int32_t target_of(Decode& d, const Arg& a) {
  if (a.kind != Arg::symbol || a.reg_index < 0) d.wrong("label '" + a.text + "' is not defined");
  return a.reg_index;
}
}  // namespace

void add_control(Decoders& t) {
  t["bra"] = [](Decode& d) {
    d.take("uni");
    d.in.imm = target_of(d, d.arg(0));
    d.in.run = bra;
  };
  t["brx"] = [](Decode& d) {
    if (!d.take("idx")) d.wrong("needs .idx");
    d.take("uni");
    d.src(0, Type::b32);
    const Arg& list = d.arg(1);
    if (list.kind != Arg::symbol || list.reg_index > -2) d.wrong("needs a list of .branchtargets");
    d.in.extra = &d.f.branch_targets[static_cast<size_t>(-2 - list.reg_index)];
    d.in.run = brx;
  };
  t["call"] = decode_call;
  t["ret"] = [](Decode& d) { d.take("uni"); d.in.run = ret; };
  t["exit"] = [](Decode& d) { d.in.run = exit_; };
  t["trap"] = [](Decode& d) { d.in.run = trap; };
  t["brkpt"] = [](Decode& d) { d.in.run = nothing; };
  t["nanosleep"] = [](Decode& d) { d.take("u32"); d.src(0, Type::b32); d.in.run = sleep_; };
  t["griddepcontrol"] = [](Decode& d) { d.in.run = d.must({"launch_dependents", "wait"}) == 1 ? wait_for_launch : let_next_start; };
  t["setmaxnreg"] = [](Decode& d) {
    d.must({"inc", "dec"});
    if (!d.take("sync")) d.wrong("needs .sync");
    if (!d.take("aligned")) d.wrong("needs .aligned");
    d.take("u32");
    const Arg& n = d.arg(0);
    if (n.kind != Arg::integer || n.value < 24 || n.value > 256 || n.value % 8) d.wrong("the number of registers is a multiple of 8 from 24 to 256");
    d.in.run = nothing;
  };
}

}  // namespace dsv4::sim

// Parser, statements: bodies of functions, operands, registers, labels, source locations. Module level: parse_module.cpp.
#include "parse.h"

namespace dsv4::sim {
namespace {
constexpr size_t kBudget = 1 << 24;
int32_t slot_bytes(Type t) { return t == Type::pred ? 4 : bits_of(t) <= 32 ? 128 : bits_of(t) == 64 ? 256 : 512; }
}  // namespace

int Parser::add_register(Function& f, const std::string& name, Type type) {
  if (++budget_ > kBudget) lexer_.wrong("too many registers");
  const int32_t bytes = slot_bytes(type);
  const int32_t slot = static_cast<int32_t>((f.register_bytes + bytes - 1) / bytes * bytes);  // vector loads stay aligned
  f.register_bytes = static_cast<uint64_t>(slot) + bytes;
  if (f.register_bytes > (1u << 26)) lexer_.wrong("the registers of one function exceed 64 MiB");
  f.registers.push_back({name, type, slot});
  return static_cast<int>(f.registers.size()) - 1;
}

void Parser::registers(Function& f) {
  std::vector<Type> type;
  while (lexer_.peek().kind == Token::dot) {
    const std::string word = lexer_.next().s;
    if (word == "v2" || word == "v4") fail("PTX line %u: vector registers (.%s) are not modelled.", lexer_.peek().line, word.c_str());
    type.push_back(type_named(word));
  }
  if (type.size() != 1 || type[0] == Type::none) lexer_.wrong("one register type was expected");
  Scope& scope = scopes_[scope_];
  do {
    if (lexer_.peek().kind != Token::name) lexer_.wrong("a register name was expected");
    const std::string name = lexer_.next().s;
    if (lexer_.accept("<")) {
      const Number n = number_of(lexer_.next(), lexer_);
      lexer_.expect(">");
      if (n.real || n.value > (1u << 20)) lexer_.wrong("the number of registers is absurd");
      scope.counted[name] = static_cast<int>(f.registers.size());
      scope.counts[name] = static_cast<int>(n.value);
      for (uint64_t i = 0; i < n.value; ++i) add_register(f, name + std::to_string(i), type[0]);
    } else {
      scope.registers[name] = add_register(f, name, type[0]);
    }
  } while (lexer_.accept(","));
  lexer_.expect(";");
}

int Parser::find_register(Function& f, const std::string& name, bool must) {
  size_t digits = name.size();
  while (digits > 0 && name[digits - 1] >= '0' && name[digits - 1] <= '9') --digits;
  const bool numbered = digits < name.size() && digits > 0 && name.size() - digits < 8;
  const std::string prefix = name.substr(0, digits);
  for (int s = scope_; s >= 0; s = scopes_[s].parent) {
    const Scope& scope = scopes_[s];
    const auto it = scope.registers.find(name);
    if (it != scope.registers.end()) return it->second;
    if (!numbered) continue;
    const auto family = scope.counted.find(prefix);
    if (family == scope.counted.end()) continue;
    const int i = std::atoi(name.c_str() + digits);
    if (i < scope.counts.at(prefix)) return family->second + i;
  }
  (void)f;
  if (must) lexer_.wrong("register '" + name.substr(0, 60) + "' is not declared");
  return -1;
}

Arg Parser::memory(Function& f, int depth) {
  Arg m;
  m.kind = Arg::memory;
  m.parts.push_back(operand(f, depth + 1));
  if (m.parts[0].kind == Arg::integer) { m.offset = 0; }
  while (lexer_.at("+") || lexer_.at("-")) {
    bool minus = lexer_.next().s == "-";
    if (lexer_.accept("-")) minus = !minus;
    const Number n = number_of(lexer_.next(), lexer_);
    if (n.real) lexer_.wrong("an address offset is an integer");
    m.offset += minus ? -static_cast<int64_t>(n.value) : static_cast<int64_t>(n.value);
  }
  while (lexer_.accept(",")) m.parts.push_back(operand(f, depth + 1));
  lexer_.expect("]");
  return m;
}

Arg Parser::operand(Function& f, int depth) {
  if (depth > 8) lexer_.wrong("operands are nested too deeply");
  Arg a;
  if (lexer_.accept("[")) return memory(f, depth);
  if (lexer_.at("{") || lexer_.at("(")) {
    const bool braces = lexer_.next().s == "{";
    a.kind = braces ? Arg::vector : Arg::list;
    const char* close = braces ? "}" : ")";
    if (!lexer_.at(close)) do a.parts.push_back(operand(f, depth + 1)); while (lexer_.accept(","));
    lexer_.expect(close);
    return a;
  }
  if (lexer_.accept("!")) {
    a = operand(f, depth + 1);
    if (a.kind != Arg::reg) lexer_.wrong("'!' stands before a predicate");
    a.negated = !a.negated;
    return a;
  }
  bool minus = false;
  while (lexer_.at("-") || lexer_.at("+")) if (lexer_.next().s == "-") minus = !minus;
  const Token t = lexer_.peek();
  if (t.kind == Token::number) {
    lexer_.next();
    const Number n = number_of(t, lexer_);
    a.kind = n.real ? Arg::real : Arg::integer;
    a.real_bits = n.bits;
    a.value = n.value;
    a.text = (minus ? "-" : "") + t.s;
    if (minus) a.value = n.real ? n.value ^ (uint64_t{1} << (n.bits - 1)) : uint64_t{0} - n.value;
  } else if (t.kind == Token::name) {
    lexer_.next();
    a.text = t.s;
    if (lexer_.peek().kind == Token::dot && lexer_.peek().glued) a.text += "." + lexer_.next().s;
    if (a.text == "_") a.kind = Arg::sink;
    else if ((a.reg_index = find_register(f, a.text, false)) >= 0) a.kind = Arg::reg;
    else if (a.text[0] == '%') a.kind = Arg::special;
    else if (a.text == "WARP_SZ") { a.kind = Arg::integer; a.value = 32; }
    else a.kind = Arg::symbol;
    if (minus) {
      if (a.kind != Arg::reg) lexer_.wrong("'-' stands before a number or register");
      a.negated = true;
    }
  } else lexer_.wrong("an operand was expected");
  if (lexer_.accept("|")) {
    Arg pair;
    pair.kind = Arg::pair;
    pair.parts.push_back(a);
    pair.parts.push_back(operand(f, depth + 1));
    return pair;
  }
  return a;
}

void Parser::location() {
  const auto number = [&] {
    const Number n = number_of(lexer_.next(), lexer_);
    return static_cast<uint32_t>(n.value);
  };
  const uint32_t file = number(), line = number(), column = number();
  const auto key = std::make_tuple(file, line, column);
  bool inlined = false;
  while (lexer_.accept(",")) {
    const std::string word = lexer_.next().s;
    if (word == "inlined_at") {
      const uint32_t a = number(), b = number(), c = number();
      inlined_[key] = std::make_tuple(a, b, c);
      inlined = true;
    } else {
      lexer_.next();  // the name
      if (lexer_.accept("+")) lexer_.next();
    }
  }
  loc_ = {file, line, file, line};
  auto at = key;
  for (int i = 0; inlined && i < 64; ++i) {
    const auto up = inlined_.find(at);
    if (up == inlined_.end() || up->second == at) break;
    at = up->second;
    loc_.outer_file = std::get<0>(at);
    loc_.outer_line = std::get<1>(at);
  }
}

void Parser::directive(Function& f) {
  const Token t = lexer_.next();
  if (t.s == "reg") registers(f);
  else if (t.s == "loc") location();
  else if (t.s == "local" || t.s == "shared" || t.s == "param") {
    const Space space = t.s == "local" ? Space::local : t.s == "shared" ? Space::shared : Space::param;
    do {
      Variable v = variable(space, nullptr);
      uint64_t& end = space == Space::local ? f.local_bytes : space == Space::shared ? f.shared_bytes : f.param_bytes;
      v.offset = (end + v.align - 1) / v.align * v.align;
      end = v.offset + v.size;
      if (space == Space::shared) f.shared_align = std::max(f.shared_align, v.align);
      if (end > (1u << 24)) lexer_.wrong("variables of one function exceed 16 MiB");
      scopes_[scope_].variables[v.name] = v;
    } while (lexer_.accept(","));
    lexer_.expect(";");
  } else if (t.s == "pragma") {
    lexer_.next();
    lexer_.expect(";");
  } else if (t.s == "file" || t.s == "section") lexer_.wrong("this directive stands outside functions");
  else lexer_.wrong("directive '." + t.s + "' is not modelled");
}

void Parser::statement(Function& f) {
  if (++budget_ > kBudget) lexer_.wrong("too many statements");
  Raw raw;
  raw.line = lexer_.peek().line;
  raw.loc = loc_;
  raw.scope = scope_;
  if (lexer_.accept("@")) {
    raw.guard_not = lexer_.accept("!");
    raw.guard = find_register(f, lexer_.next().s, true);
  }
  if (lexer_.peek().kind != Token::name) lexer_.wrong("an instruction was expected");
  raw.op = lexer_.next().s;
  if (raw.guard < 0 && lexer_.accept(":")) {
    auto& scope = scopes_[scope_];
    if (lexer_.at_dot("branchtargets")) {
      lexer_.next();
      auto& list = scope.targets[raw.op];
      do list.push_back(lexer_.next().s); while (lexer_.accept(","));
      lexer_.expect(";");
    } else if (lexer_.at_dot("callprototype") || lexer_.at_dot("calltargets")) {
      while (!lexer_.at(";") && lexer_.peek().kind != Token::end) lexer_.next();
      lexer_.expect(";");
    } else if (!scope.labels.emplace(raw.op, static_cast<int>(f.statements.size())).second) {
      lexer_.wrong("label '" + raw.op + "' stands twice");
    }
    return;
  }
  while (lexer_.peek().kind == Token::dot) raw.mods.push_back(lexer_.next().s);
  if (!lexer_.at(";")) do raw.args.push_back(operand(f)); while (lexer_.accept(","));
  if (!lexer_.at(";")) lexer_.wrong("';' was expected after '" + raw.op + "'");
  lexer_.next();
  f.statements.push_back(std::move(raw));
}

// Symbols become what they name: labels a statement, variables an address, anything else stays a symbol (functions).
void Parser::resolve(Function& f) {
  const auto label = [&](int scope, const std::string& name) {
    for (int s = scope; s >= 0; s = scopes_[s].parent) {
      const auto it = scopes_[s].labels.find(name);
      if (it != scopes_[s].labels.end()) return it->second;
    }
    return -1;
  };
  for (Raw& raw : f.statements) {
    for (Arg& top : raw.args) {
      std::vector<Arg*> todo{&top};
      while (!todo.empty()) {
        Arg& a = *todo.back();
        todo.pop_back();
        for (Arg& part : a.parts) todo.push_back(&part);
        if (a.kind != Arg::symbol) continue;
        const int at = label(raw.scope, a.text);
        if (at >= 0) { a.reg_index = at; continue; }
        for (int s = raw.scope; s >= 0; s = scopes_[s].parent) {
          const auto v = scopes_[s].variables.find(a.text);
          if (v == scopes_[s].variables.end()) continue;
          a.value = v->second.offset;
          a.real_bits = 1 + static_cast<int>(v->second.space);  // a variable of this function in that space
          break;
        }
        if (a.real_bits) continue;
        for (int s = raw.scope; s >= 0; s = scopes_[s].parent) {
          const auto t = scopes_[s].targets.find(a.text);
          if (t == scopes_[s].targets.end()) continue;
          std::vector<int32_t> list;
          for (const std::string& name : t->second) {
            const int to = label(raw.scope, name);
            if (to < 0) fail("PTX line %u: branch target '%s' is not defined.", raw.line, name.c_str());
            list.push_back(to);
          }
          a.reg_index = -2 - static_cast<int>(f.branch_targets.size());
          f.branch_targets.push_back(list);
          break;
        }
      }
    }
  }
}

void Parser::body(Function& f) {
  lexer_.expect("{");
  while (scope_ >= 0) {
    const Token& t = lexer_.peek();
    if (t.kind == Token::end) lexer_.wrong("the function is not closed");
    if (lexer_.accept("{")) {
      scopes_.push_back({scope_, {}, {}, {}, {}, {}, {}});
      scope_ = static_cast<int>(scopes_.size()) - 1;
      if (++budget_ > kBudget) lexer_.wrong("too many scopes");
    } else if (lexer_.accept("}")) scope_ = scopes_[scope_].parent;
    else if (lexer_.accept(";")) {}
    else if (t.kind == Token::dot) directive(f);
    else statement(f);
  }
  resolve(f);
}

}  // namespace dsv4::sim

// Parser, module level: variables, functions and their attributes, sections; the cache of modules.
#include <sys/stat.h>

#include <cstring>
#include <fstream>
#include <mutex>
#include <sstream>

#include "parse.h"

namespace dsv4::sim {

Variable Parser::variable(Space space, std::vector<uint8_t>* data) {
  Variable v;
  v.space = space;
  Type type = Type::none;
  uint64_t vector = 1;
  while (lexer_.peek().kind == Token::dot) {
    const std::string word = lexer_.next().s;
    if (word == "align") {
      const Number n = number_of(lexer_.next(), lexer_);
      if (n.real || n.value == 0 || n.value > 4096 || (n.value & (n.value - 1))) lexer_.wrong("an alignment is a power of two up to 4096");
      v.align = n.value;
    } else if (word == "v2" || word == "v4") vector = word == "v2" ? 2 : 4;
    else if (word == "ptr" || word == "const" || word == "global" || word == "shared" || word == "local") {}  // attributes of a parameter
    else if ((type = type_named(word)) == Type::none) lexer_.wrong("'." + word + "' in a variable is not modelled");
  }
  if (type == Type::none || type == Type::pred) lexer_.wrong("a variable needs a type");
  const uint64_t element = bits_of(type) / 8;
  if (element == 0) lexer_.wrong("a variable needs a type of whole bytes");
  if (v.align < element) v.align = element;
  if (lexer_.peek().kind != Token::name) lexer_.wrong("the name of a variable was expected");
  v.name = lexer_.next().s;
  uint64_t count = vector;
  bool open = false;
  while (lexer_.accept("[")) {
    if (lexer_.accept("]")) { open = true; continue; }
    const Number n = number_of(lexer_.next(), lexer_);
    lexer_.expect("]");
    if (n.real || n.value > (1u << 26) || (count *= n.value) > (1u << 26)) lexer_.wrong("an array of this size is absurd");
  }
  v.dynamic = open && space == Space::shared;
  v.size = v.dynamic ? 0 : element * count;
  if (lexer_.accept("=")) {
    if (!data) lexer_.wrong("this variable cannot have an initial value");
    data->assign(v.size, 0);
    uint64_t i = 0;
    int depth = 0;
    do {
      if (lexer_.accept("{")) { ++depth; continue; }
      while (lexer_.at("}") && depth > 0) { lexer_.next(); --depth; }
      if (lexer_.accept(",")) continue;
      if (depth == 0 && (lexer_.at(";") || i > 0)) break;
      const bool minus = lexer_.accept("-");
      if (lexer_.peek().kind != Token::number) lexer_.wrong("initial values that are addresses are not modelled");
      const Number n = number_of(lexer_.next(), lexer_);
      uint64_t value = minus ? (n.real ? n.value ^ (uint64_t{1} << (n.bits - 1)) : uint64_t{0} - n.value) : n.value;
      if ((i + 1) * element > data->size()) {
        if (!open) lexer_.wrong("too many initial values");
        data->resize((i + 1) * element);
      }
      std::memcpy(data->data() + i++ * element, &value, std::min<uint64_t>(8, element));
    } while (true);
    if (open) v.size = data->size();
  }
  return v;
}

void Parser::declaration(bool external) {
  const std::string where = lexer_.next().s;
  const Space space = where == "global" ? Space::global : where == "const" ? Space::constant : Space::shared;
  do {
    std::vector<uint8_t> data;
    Variable v = variable(space, &data);
    if (space == Space::shared) {
      if (external) v.dynamic = true;
      if (!v.dynamic) {
        v.offset = (module_.shared_bytes + v.align - 1) / v.align * v.align;
        module_.shared_bytes = v.offset + v.size;
        if (module_.shared_bytes > (1u << 24)) lexer_.wrong("the shared variables exceed 16 MiB");
      }
    } else {
      if ((budget_ += v.size) > (1u << 27)) lexer_.wrong("the variables of the module exceed 128 MiB");
      auto storage = std::make_unique<std::vector<uint64_t>>(v.size / 8 + 4);
      auto* base = reinterpret_cast<uint8_t*>(storage->data());
      base += -reinterpret_cast<uintptr_t>(base) & 15;
      if (!data.empty()) std::memcpy(base, data.data(), data.size());
      v.data = base;
      module_.storage.push_back(std::move(storage));
    }
    module_.variables.push_back(v);
  } while (lexer_.accept(","));
  lexer_.expect(";");
}

void Parser::formals(Function& f, std::vector<Variable>& into, bool kernel) {
  lexer_.expect("(");
  while (!lexer_.at(")")) {
    if (!lexer_.at_dot("param")) lexer_.wrong("parameters in registers are not modelled; '.param' was expected");
    lexer_.next();
    Variable v = variable(Space::param, nullptr);
    v.offset = (f.param_bytes + v.align - 1) / v.align * v.align;
    f.param_bytes = v.offset + v.size;
    if (f.param_bytes > (1u << 20)) lexer_.wrong("the parameters exceed 1 MiB");
    scopes_[0].variables[v.name] = v;
    into.push_back(v);
    if (!lexer_.accept(",")) break;
  }
  lexer_.expect(")");
  (void)kernel;
}

void Parser::limits(Function& f) {
  const auto triple = [&](uint32_t* out) {
    for (int i = 0; i < 3; ++i) out[i] = 1;
    for (int i = 0; i < 3; ++i) {
      const Number n = number_of(lexer_.next(), lexer_);
      out[i] = static_cast<uint32_t>(std::min<uint64_t>(n.value, 1u << 30));
      if (!lexer_.accept(",")) break;
    }
  };
  uint32_t ignored[3];
  while (lexer_.peek().kind == Token::dot) {
    const std::string word = lexer_.next().s;
    if (word == "maxntid") triple(f.max_threads);
    else if (word == "reqntid") triple(f.required_threads);
    else if (word == "reqnctapercluster") triple(f.required_cluster);
    else if (word == "minnctapersm" || word == "maxnctapersm" || word == "maxnreg" || word == "maxclusterrank") triple(ignored);
    else if (word == "noreturn" || word == "explicitcluster") {}
    else if (word == "pragma") { lexer_.next(); lexer_.expect(";"); }
    else lexer_.wrong("'." + word + "' on a function is not modelled");
  }
}

void Parser::function(bool entry, bool external) {
  auto f = std::make_unique<Function>();
  f->entry = entry;
  f->module = &module_;
  f->line = lexer_.peek().line;
  scopes_.assign(1, {-1, {}, {}, {}, {}, {}, {}});
  scope_ = 0;
  loc_ = {};
  if (!entry && lexer_.at("(")) formals(*f, f->returns, false);
  if (lexer_.peek().kind != Token::name) lexer_.wrong("the name of a function was expected");
  f->name = lexer_.next().s;
  if (lexer_.at("(")) formals(*f, f->params, entry);
  limits(*f);
  const bool declared_only = lexer_.accept(";");
  if (declared_only) f->external = true;
  else body(*f);
  (void)external;
  auto& place = module_.functions[f->name];
  if (!place || place->external) place = std::move(f);
  else if (!declared_only) lexer_.wrong("function '" + f->name + "' is defined twice");
}

void Parser::skip_section() {
  while (lexer_.peek().kind == Token::dot || lexer_.peek().kind == Token::name) lexer_.next();
  lexer_.expect("{");
  for (int depth = 1; depth > 0;) {
    if (lexer_.peek().kind == Token::end) lexer_.wrong("the section is not closed");
    const Token t = lexer_.next();
    if (t.kind == Token::mark) depth += t.s == "{" ? 1 : t.s == "}" ? -1 : 0;
  }
}

void Parser::parse() {
  bool external = false;
  while (lexer_.peek().kind != Token::end) {
    if (lexer_.accept(";")) continue;
    if (lexer_.peek().kind != Token::dot) lexer_.wrong("a directive was expected");
    const std::string word = lexer_.peek().s;
    if (word == "global" || word == "const" || word == "shared") {
      declaration(external);
      external = false;
      continue;
    }
    lexer_.next();
    if (word == "version") lexer_.next();
    else if (word == "target") { module_.target = lexer_.next().s; while (lexer_.accept(",")) lexer_.next(); }
    else if (word == "address_size") { if (number_of(lexer_.next(), lexer_).value != 64) lexer_.wrong("addresses have 64 bits"); }
    else if (word == "extern" || word == "weak" || word == "visible" || word == "common") { external = word == "extern"; }
    else if (word == "entry" || word == "func") { function(word == "entry", external); external = false; }
    else if (word == "file") {
      const uint32_t n = static_cast<uint32_t>(number_of(lexer_.next(), lexer_).value);
      module_.files[n] = lexer_.next().s;
      while (lexer_.accept(",")) lexer_.next();
    } else if (word == "section") skip_section();
    else if (word == "pragma") { lexer_.next(); lexer_.expect(";"); }
    else lexer_.wrong("directive '." + word + "' is not modelled");
  }
}

std::unique_ptr<Module> parse_module(const std::string& text, const std::string& path) {
  auto module = std::make_unique<Module>();
  module->path = path;
  Parser(text, *module).parse();
  decode_module(*module);
  return module;
}

std::shared_ptr<const Module> load_module(const std::string& path) {
  struct Entry { int64_t time, bytes; std::shared_ptr<const Module> module; };
  static std::mutex mutex;
  static std::map<std::string, Entry> cache;
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) fail("The PTX file '%s' cannot be read; build the native library with nvcc at hand.", path.c_str());
  const int64_t time = info.st_mtim.tv_sec * 1000000000LL + info.st_mtim.tv_nsec;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto it = cache.find(path);
  if (it != cache.end() && it->second.time == time && it->second.bytes == info.st_size) return it->second.module;
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  std::shared_ptr<const Module> module = parse_module(text.str(), path);
  cache[path] = {time, info.st_size, module};
  return module;
}

}  // namespace dsv4::sim

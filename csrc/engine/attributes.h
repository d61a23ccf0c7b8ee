// Attributes of instructions, and the reading of them.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace mixbits {

using Shape = std::vector<std::int64_t>;

// "[2, 3]"
std::string words(const Shape& shape);

// Throws std::invalid_argument unless the condition holds.
void need(bool condition, const std::string& problem);

// A stored constant.
struct Constant {
  Shape shape;
  std::vector<float> values;
};

// An attribute as core/instructions.py declares it: null, or of one of these kinds; names of constants are
// replaced by what they stand for, "batch" in a shape by kBatch.
using Attribute = std::variant<std::monostate, bool, std::int64_t, double, std::string, Shape,
                               std::vector<std::array<std::int64_t, 2>>, Constant>;
using Attributes = std::map<std::string, Attribute>;
inline constexpr std::int64_t kBatch = 0;

inline constexpr std::int64_t kMaxSize = 1 << 26;  // MAX_SIZE of core/instructions.py

// The attributes of one instruction, read one by one; what is missing, of another kind, out of range or left
// over throws std::invalid_argument, in words that name the instruction and the attribute.
class Reader {
 public:
  Reader(std::string name, Attributes attributes);

  bool flag(const char* key);
  std::string choice(const char* key);
  double number(const char* key);
  double positive(const char* key);
  std::optional<double> maybe_number(const char* key);
  std::int64_t integer(const char* key, std::int64_t low, std::int64_t high = kMaxSize);
  std::optional<std::int64_t> maybe_integer(const char* key, std::int64_t low);
  Shape integers(const char* key, std::int64_t low, std::int64_t high = kMaxSize);
  Shape spatial(const char* key, std::int64_t low);  // of the one or two dimensions that windows have
  std::vector<std::array<std::int64_t, 2>> pairs(const char* key, std::int64_t low);
  Constant constant(const char* key);
  std::shared_ptr<const Constant> maybe_constant(const char* key);  // null if there is none

  void done() const;  // nothing is left

  // Throws, naming the attribute, unless the condition holds.
  void need(const char* key, bool condition, const std::string& problem) const;

 private:
  Attribute take(const char* key);
  template <class T>
  T as(const char* key, const char* kind, const Attribute& value) const;

  const std::string name_;
  Attributes left_;
};

}  // namespace mixbits

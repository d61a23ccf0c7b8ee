#include "engine/attributes.h"

#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#include "engine/tensor.h"

namespace mixbits {

std::string words(const Shape& shape) {
  std::string text = "[";
  for (const std::int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

void need(bool condition, const std::string& problem) {
  if (!condition) throw std::invalid_argument(problem);
}

Reader::Reader(std::string name, Attributes attributes)
    : name_(std::move(name)), left_(std::move(attributes)) {}

void Reader::need(const char* key, bool condition, const std::string& problem) const {
  mixbits::need(condition, name_ + ": attribute " + key + ": " + problem);
}

Attribute Reader::take(const char* key) {
  const auto found = left_.find(key);
  need(key, found != left_.end(), "it is missing");
  Attribute value = std::move(found->second);
  left_.erase(found);
  return value;
}

template <class T>
T Reader::as(const char* key, const char* kind, const Attribute& value) const {
  const T* held = std::get_if<T>(&value);
  need(key, held != nullptr, std::string("it is not ") + kind);
  return *held;
}

bool Reader::flag(const char* key) { return as<bool>(key, "true or false", take(key)); }

std::string Reader::choice(const char* key) { return as<std::string>(key, "a word", take(key)); }

double Reader::number(const char* key) {
  const auto number = maybe_number(key);
  need(key, number.has_value(), "it is null");
  return *number;
}

double Reader::positive(const char* key) {
  const double value = number(key);
  need(key, value > 0, "it is not above 0");
  return value;
}

std::optional<double> Reader::maybe_number(const char* key) {
  const Attribute value = take(key);
  if (std::holds_alternative<std::monostate>(value)) return std::nullopt;
  if (const auto* integer = std::get_if<std::int64_t>(&value)) return static_cast<double>(*integer);
  const auto number = as<double>(key, "a number", value);
  need(key, std::isfinite(number), "it is not finite");
  return number;
}

std::int64_t Reader::integer(const char* key, std::int64_t low, std::int64_t high) {
  const auto value = as<std::int64_t>(key, "an integer", take(key));
  need(key, low <= value && value <= high, std::to_string(value) + " is out of range");
  return value;
}

std::optional<std::int64_t> Reader::maybe_integer(const char* key, std::int64_t low) {
  const auto found = left_.find(key);
  if (found == left_.end() || !std::holds_alternative<std::monostate>(found->second)) {
    return integer(key, low);
  }
  left_.erase(found);
  return std::nullopt;
}

Shape Reader::integers(const char* key, std::int64_t low, std::int64_t high) {
  auto values = as<Shape>(key, "a list of integers", take(key));
  need(key, values.size() <= kMaxRank, "it has too many entries");
  for (const std::int64_t value : values) {
    need(key, low <= value && value <= high, std::to_string(value) + " is out of range");
  }
  return values;
}

Shape Reader::spatial(const char* key, std::int64_t low) {
  Shape sizes = integers(key, low);
  need(key, sizes.size() == 1 || sizes.size() == 2, "windows have one or two dimensions");
  return sizes;
}

std::vector<std::array<std::int64_t, 2>> Reader::pairs(const char* key, std::int64_t low) {
  using Pairs = std::vector<std::array<std::int64_t, 2>>;
  const Attribute value = take(key);
  if (const Shape* none = std::get_if<Shape>(&value); none != nullptr && none->empty()) return {};
  auto pairs = as<Pairs>(key, "a list of pairs", value);
  need(key, pairs.size() <= kMaxRank, "it has too many entries");
  for (const auto& pair : pairs) {
    for (const std::int64_t entry : pair) {
      need(key, low <= entry && entry <= kMaxSize, std::to_string(entry) + " is out of range");
    }
  }
  return pairs;
}

Constant Reader::constant(const char* key) { return as<Constant>(key, "a constant", take(key)); }

std::shared_ptr<const Constant> Reader::maybe_constant(const char* key) {
  const Attribute value = take(key);
  if (std::holds_alternative<std::monostate>(value)) return nullptr;
  return std::make_shared<const Constant>(as<Constant>(key, "a constant or null", value));
}

void Reader::done() const {
  mixbits::need(left_.empty(),
                name_ + ": it has no attribute " + (left_.empty() ? "" : left_.begin()->first));
}

}  // namespace mixbits

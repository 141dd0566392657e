// What the generated header says of an op: ports with symbolic dimensions, fields, which outputs may share an input's
// memory. No TensorRT header is needed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kimi {

// A view of a constant array.
template <class T>
struct List {
  const T* items = nullptr;
  int32_t count = 0;

  constexpr List() = default;
  template <size_t N>
  constexpr List(const T (&array)[N]) : items(array), count(static_cast<int32_t>(N)) {}
  constexpr const T& operator[](int32_t index) const { return items[index]; }
  constexpr const T* begin() const { return items; }
  constexpr const T* end() const { return items + count; }
};

// One step of a dimension's postfix program.
struct DimensionStep {
  enum Kind : int32_t { kConstant, kSymbol, kAdd, kSubtract, kMultiply, kDivide, kMax } kind;
  int32_t value;  // the constant, or the index of the symbol
};

struct DimensionSpec {
  const char* text;
  List<DimensionStep> steps;

  // Index of the symbol that this dimension is, -1 when it is an expression.
  constexpr int32_t symbol() const {
    return steps.count == 1 && steps[0].kind == DimensionStep::kSymbol ? steps[0].value : -1;
  }
};

// kT: the model's dtype. kS: a second floating dtype, of states; it is T where no input has it.
enum class PortType { kT, kS, kFloat32, kInt32, kUint8 };

struct PortSpec {
  const char* name;
  PortType type;
  bool optional;
  List<DimensionSpec> dims;
};

enum class FieldType { kInt, kFloat, kString };

struct FieldSpec {
  const char* name;
  FieldType type;
  int32_t symbol;  // which dimension symbol an integer is, or -1
  bool required;
  int32_t integer;  // default of an optional field; of a string, the index of its choice
  float real;
  List<const char*> choices;
};

struct OpSpec {
  const char* name;
  const char* plugin_namespace;
  const char* version;
  const char* abi;  // null for ONNX's own operators
  List<PortSpec> inputs;
  List<PortSpec> outputs;
  List<FieldSpec> fields;
  List<const char*> symbols;
  List<int> aliases;  // for each output the input whose memory it may share, or -1
  int32_t abi_field;  // indices of the fields that are not the op's attributes; -1 where it has none
  int32_t in_place_field;
  int32_t workspace_field;
};

inline constexpr int32_t kMaxSymbols = 16;
inline constexpr int32_t kMaxPorts = 16;

// Value of a dimension: `algebra` turns constants into values and combines them, `symbols` holds their values.
template <class Value, class Algebra>
Value evaluate(const DimensionSpec& dimension, const Value* symbols, Algebra&& algebra) {
  Value stack[8] = {};
  int32_t top = 0;
  for (const DimensionStep& step : dimension.steps) {
    if (step.kind == DimensionStep::kConstant) {
      stack[top++] = algebra.constant(step.value);
    } else if (step.kind == DimensionStep::kSymbol) {
      stack[top++] = symbols[step.value];
    } else {
      --top;
      stack[top - 1] = algebra.combine(step.kind, stack[top - 1], stack[top]);
    }
  }
  return stack[0];
}

// Dimensions as plain sizes.
struct SizeAlgebra {
  int64_t constant(int32_t value) const { return value; }
  int64_t combine(DimensionStep::Kind kind, int64_t first, int64_t second) const {
    switch (kind) {
      case DimensionStep::kAdd:
        return first + second;
      case DimensionStep::kSubtract:
        return first - second;
      case DimensionStep::kMultiply:
        return first * second;
      case DimensionStep::kMax:
        return first > second ? first : second;
      default:
        return second > 0 ? first / second : -1;
    }
  }
};

}  // namespace kimi

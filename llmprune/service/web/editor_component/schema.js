// Look-ups in the recipe's JSON schema.
let loading = null;

// Load the schema once; null where the service does not answer.
export function loadSchema() {
  loading ??= fetch("/submit/schema").then((answer) => (answer.ok ? answer.json() : null)).catch(() => null);
  return loading;
}

// Return the plain schemas that a schema stands for: references and alternatives resolved.
export function alternatives(root, schema) {
  if (!schema) return [];
  if (schema.$ref) return alternatives(root, { ...root.$defs[schema.$ref.split("/").pop()], ...withoutRef(schema) });
  const several = schema.anyOf ?? schema.oneOf ?? schema.allOf;
  if (several) return several.flatMap((one) => alternatives(root, one));
  return schema.type === "array" && schema.items ? [schema, ...alternatives(root, schema.items)] : [schema];
}

// Return the plain schemas of the value at a path of keys.
export function schemasAt(root, path) {
  return path.reduce((schemas, key) => schemas.flatMap((one) => {
    const inner = one.properties?.[key] ?? (typeof one.additionalProperties === "object" ? one.additionalProperties : null);
    return alternatives(root, inner);
  }), alternatives(root, root));
}

// Return the keys of a mapping at a path, each with the schema that declares it.
export function keysAt(root, path) {
  const found = new Map();
  for (const one of schemasAt(root, path)) {
    for (const [key, schema] of Object.entries(one.properties ?? {})) if (!found.has(key)) found.set(key, schema);
  }
  return found;
}

// Return the values that a key may have, where they are a fixed set.
export function valuesAt(root, path) {
  const found = schemasAt(root, path).flatMap((one) =>
    one.enum ?? (one.const !== undefined ? [one.const] : one.type === "boolean" ? [true, false] : []));
  return [...new Set(found)];
}

// Return the description of a key: its own, else that of the section that it holds.
export function describe(root, schema) {
  return schema.description ?? alternatives(root, schema).map((one) => one.description).find(Boolean) ?? "";
}

function withoutRef(schema) {
  const { $ref, ...rest } = schema;
  return rest;
}

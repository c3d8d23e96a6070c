//! The JSON Schema of the policy file, made of the very tables that the loader reads by.
//!
//! It is published as `docs/policy.schema.json`, for editors; a test compares the two. What a schema cannot
//! say (that names are unique, that sets exist) only the loader checks.

use serde_json::{Map, Value, json};

use crate::policy::keys::{self, Key, Shape, Table};

/// The schema, as JSON text.
pub fn schema() -> String {
    let mut root = table(&keys::DOCUMENT);
    if let Value::Object(fields) = &mut root {
        fields.insert(
            "$schema".into(),
            "https://json-schema.org/draft/2020-12/schema".into(),
        );
        fields.insert("title".into(), "A policy of vnet".into());
        fields.insert("description".into(), "See docs/policy.md.".into());
    }
    let mut text = serde_json::to_string_pretty(&root).unwrap_or_default();
    text.push('\n');
    text
}

fn table(table: &Table) -> Value {
    let property = |key: &Key| {
        let mut value = shape(&key.shape);
        if let Value::Object(fields) = &mut value {
            fields.insert("description".into(), key.about.into());
        }
        (key.name.to_owned(), value)
    };
    let mut fields = Map::new();
    fields.insert("type".into(), "object".into());
    fields.insert("additionalProperties".into(), false.into());
    fields.insert(
        "properties".into(),
        Value::Object(table.keys.iter().map(property).collect()),
    );
    if !table.required.is_empty() {
        fields.insert("required".into(), table.required.into());
    }
    Value::Object(fields)
}

fn shape(of: &Shape) -> Value {
    match of {
        Shape::Exactly(number) => json!({"const": number}),
        Shape::Boolean => json!({"type": "boolean"}),
        Shape::Text | Shape::Path => json!({"type": "string", "minLength": 1}),
        Shape::Word(words) => json!({"enum": words()}),
        Shape::Span => json!({"oneOf": [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
        ]}),
        Shape::Moment => json!({
            "type": "string",
            "format": "date-time",
            "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\\.[0-9]+)?Z$",
        }),
        Shape::Name => json!({"type": "string", "pattern": "^(@[A-Za-z0-9._-]+|(\\*\\.)?[^*@:/\\s]+)$"}),
        Shape::Prefix => {
            json!({"type": "string", "pattern": "^(@[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(/[0-9]+)?)$"})
        }
        Shape::Port => json!({"oneOf": [
            {"type": "integer", "minimum": 1, "maximum": 65535},
            {"type": "string", "pattern": "^[0-9]+(-[0-9]+)?$"},
        ]}),
        Shape::Listen => json!({"oneOf": [
            {"type": "integer", "minimum": 1, "maximum": 65535},
            {"type": "string", "pattern": "^([0-9]+(-[0-9]+)?|[0-9A-Fa-f:.]+|\\[[0-9A-Fa-f:.]+\\]|([0-9.]+|\\[[0-9A-Fa-f:.]+\\]):[0-9]+(-[0-9]+)?)$"},
        ]}),
        Shape::Count(least, most) => json!({"type": "integer", "minimum": least, "maximum": most}),
        Shape::Pattern => json!({"type": "string", "format": "regex", "minLength": 1}),
        Shape::NameOrPrefix => json!({"anyOf": [shape(&Shape::Name), shape(&Shape::Prefix)]}),
        Shape::Either(one, other) => json!({"anyOf": [shape(one), shape(other)]}),
        Shape::List(item) => json!({"type": "array", "items": shape(item)}),
        Shape::Some(item) => {
            json!({"anyOf": [shape(item), {"type": "array", "minItems": 1, "items": shape(item)}]})
        }
        Shape::Map(inner) => table(inner),
        Shape::MapOf(item) => json!({"type": "object", "additionalProperties": shape(item)}),
    }
}

//! The published schema, as an editor reads it: what it underlines and what it does not.
//!
//! The judge below knows the few keywords (JSON Schema 2020-12, validation) that the schema uses, and fails at any
//! other. A crate for all of them would bring features of the crates that both have into the test build, of `regex`
//! and `serde` among them, so that what is tested would not be what is shipped.

use std::fs;
use std::path::Path;

use regex::Regex;
use serde_json::Value;

use super::documentation::{Shown, pages, shown};
use super::*;

/// What is wrong with a value, each with its place.
fn problems(schema: &Value, value: &Value, at: &str) -> Vec<String> {
    let schema = match schema {
        Value::Bool(true) => return Vec::new(),
        Value::Bool(false) => return vec![format!("{at}: nothing may stand here")],
        Value::Object(schema) => schema,
        other => panic!("{at}: {other} is no schema"),
    };
    let mut found = Vec::new();
    let text = value.as_str();
    for (keyword, said) in schema {
        let number = said.as_u64().unwrap_or_default();
        let holds = match keyword.as_str() {
            // `format` is a word for readers unless a validator is told otherwise.
            "$schema" | "title" | "description" | "format" => true,
            "type" => is_a(value, said.as_str().unwrap()),
            "enum" => said.as_array().unwrap().contains(value),
            "const" => said == value,
            // The rest is about values of one type, and says nothing of others.
            "minimum" => value.as_i64().is_none_or(|n| n >= said.as_i64().unwrap()),
            "maximum" => value.as_i64().is_none_or(|n| n <= said.as_i64().unwrap()),
            "minLength" => text.is_none_or(|text| text.chars().count() as u64 >= number),
            "pattern" => text.is_none_or(|text| Regex::new(said.as_str().unwrap()).unwrap().is_match(text)),
            "minItems" => value.as_array().is_none_or(|items| items.len() as u64 >= number),
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    found.extend(problems(said, item, &format!("{at}/{index}")));
                }
                true
            }
            "required" => {
                let keys = said.as_array().unwrap();
                value
                    .as_object()
                    .is_none_or(|fields| keys.iter().all(|key| fields.contains_key(key.as_str().unwrap())))
            }
            "properties" => {
                for (key, field) in value.as_object().into_iter().flatten() {
                    if let Some(schema) = said.get(key) {
                        found.extend(problems(schema, field, &format!("{at}/{key}")));
                    }
                }
                true
            }
            "additionalProperties" => {
                let known = schema.get("properties");
                for (key, field) in value.as_object().into_iter().flatten() {
                    if known.is_none_or(|known| known.get(key).is_none()) {
                        found.extend(problems(said, field, &format!("{at}/{key}")));
                    }
                }
                true
            }
            "anyOf" | "oneOf" => {
                let ways = said.as_array().unwrap();
                let fit = ways
                    .iter()
                    .filter(|way| problems(way, value, at).is_empty())
                    .count();
                fit == 1 || keyword == "anyOf" && fit > 1
            }
            other => panic!("the judge does not know {other:?}, at {at}"),
        };
        if !holds {
            found.push(format!("{at}: {value} is against {keyword} {said}"));
        }
    }
    found
}

fn is_a(value: &Value, kind: &str) -> bool {
    match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        other => panic!("the judge does not know type {other:?}"),
    }
}

fn published_schema() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/policy.schema.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn validated(schema: &Value, document: &str) -> Vec<String> {
    problems(schema, &serde_saphyr::from_str(document).unwrap(), "")
}

#[test]
fn the_published_schema_takes_every_policy_that_is_shown_or_shipped() {
    let schema = published_schema();
    let shown: Vec<Shown> = pages().iter().flat_map(|page| shown(page)).collect();
    let presets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vnetctl/presets");
    let presets = fs::read_dir(presets).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        Shown {
            place: path.display().to_string(),
            document: fs::read_to_string(path).unwrap(),
        }
    });
    let sample = Shown {
        place: "the design's sample".to_owned(),
        document: SAMPLE.to_owned(),
    };
    let all: Vec<Shown> = shown.into_iter().chain(presets).chain([sample]).collect();
    assert!(all.len() >= 10, "{}", all.len());
    for Shown { place, document } in &all {
        assert_eq!(validated(&schema, document), [""; 0], "{place}");
    }
}

/// The schema and the reader are two judges of one file: what an editor underlines, a load refuses.
#[test]
fn the_published_schema_refuses_what_the_loader_refuses() {
    let schema = published_schema();
    for (document, place) in [
        ("version: 1\nruels: []\n", ""),
        ("version: 2\n", "/version"),
        ("defaultAction: Deny\n", "/defaultAction"),
        ("mode: quarantine\n", "/mode"),
        ("approvalTimeout: soon\n", "/approvalTimeout"),
        ("appliesTo: {nmae: a}\n", "/appliesTo"),
        ("rules: [{cidr: 10.0.0.0/8}]\n", "/rules/0"),
        ("rules: [{action: allow, port: 443}]\n", "/rules/0"),
        // What a program calls itself is shown and never matched.
        ("rules: [{action: allow, program: curl}]\n", "/rules/0"),
        ("rules: [{action: permit}]\n", "/rules/0/action"),
        ("rules: [{action: allow, ports: [70000]}]\n", "/rules/0/ports"),
        ("rules: [{action: allow, protocol: sctp}]\n", "/rules/0/protocol"),
        ("rules: [{action: allow, domains: []}]\n", "/rules/0/domains"),
        (
            "rules: [{action: allow, domains: [a.test], sni: maybe}]\n",
            "/rules/0/sni",
        ),
        ("dns: {allowedDomain: [a.test]}\n", "/dns"),
        ("dns: {answer: fake}\n", "/dns/answer"),
        ("dns: {denyWith: {code: refuse}}\n", "/dns/denyWith"),
        ("guards: {metadata: allow}\n", "/guards/metadata"),
        ("approvals: {maxScope: everything}\n", "/approvals/maxScope"),
        ("profiles: [{mode: ask}]\n", "/profiles/0"),
        ("sets: {a: {file: x, format: csv}}\n", "/sets/a/format"),
        ("tests: [{alow: [\"domain a.test\"]}]\n", "/tests/0"),
    ] {
        let found = validated(&schema, document);
        let of_place = |error: &String| error.split(": ").next().is_some_and(|at| at.starts_with(place));
        assert!(found.iter().any(of_place), "{document}: {found:?}");
        assert!(Policy::parse("p.yaml", document).is_err(), "{document}");
    }
}

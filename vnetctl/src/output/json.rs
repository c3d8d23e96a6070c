//! The contract's messages as proto3 JSON and as YAML.
//!
//! Generated types know no reflection, so a message passes through its wire form into a dynamic one
//! of the same descriptor; that is what gives canonical names, enum names, RFC 3339 times and 64-bit
//! numbers as strings (<https://protobuf.dev/programming-guides/json/>).

use std::sync::OnceLock;

use prost_reflect::{DescriptorPool, DynamicMessage};
use serde::Serialize;

use super::{Format, text};
use crate::failure::Failure;

/// A message of the contract, by its full name.
pub(super) fn dynamic(name: &'static str, message: &impl prost::Message) -> Result<DynamicMessage, Failure> {
    let unreadable = |e: &dyn std::fmt::Display| Failure::Failed(format!("cannot print a {name}: {e}"));
    let descriptor = pool()
        .get_message_by_name(name)
        .ok_or_else(|| unreadable(&"the contract has no such message"))?;
    DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()).map_err(|e| unreadable(&e))
}

/// The whole text of an object or array.
pub(super) fn render(format: Format, value: &impl Serialize) -> Result<String, Failure> {
    let json = |e: serde_json::Error| Failure::Failed(format!("cannot print as JSON: {e}"));
    if format == Format::Yaml {
        let yaml = serde_saphyr::to_string(value)
            .map_err(|e| Failure::Failed(format!("cannot print as YAML: {e}")))?;
        // A block scalar cannot carry escapes. JSON is YAML too (YAML 1.2 §1.3), and can.
        if !yaml.chars().any(|c| c != '\n' && text::acts(c)) {
            return Ok(ended(yaml));
        }
    }
    let rendered = serde_json::to_string_pretty(value).map_err(json)?;
    Ok(ended(text::safe_json(&rendered).into_owned()))
}

/// An object on one line.
pub(super) fn line(value: &impl Serialize) -> Result<String, Failure> {
    let rendered =
        serde_json::to_string(value).map_err(|e| Failure::Failed(format!("cannot print as JSON: {e}")))?;
    Ok(ended(text::safe_json(&rendered).into_owned()))
}

fn ended(mut text: String) -> String {
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    POOL.get_or_init(|| DescriptorPool::decode(vnet_proto::DESCRIPTORS).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use vnet_proto::v1;

    use super::*;

    fn grant() -> v1::Grant {
        v1::Grant {
            id: "g1".to_owned(),
            action: v1::Action::Allow.into(),
            hits: 7,
            created_at: Some(prost_types::Timestamp {
                seconds: 1_767_323_045,
                nanos: 0,
            }),
            reason: "off\u{202e} and on".to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn json_is_the_canonical_form_of_the_contract() {
        let text = line(&dynamic("vnet.v1.Grant", &grant()).unwrap()).unwrap();

        assert_eq!(
            text,
            "{\"id\":\"g1\",\"action\":\"ACTION_ALLOW\",\"createdAt\":\"2026-01-02T03:04:05Z\",\
             \"reason\":\"off\\u202e and on\",\"hits\":\"7\"}\n"
        );
    }

    #[test]
    fn yaml_means_the_same_as_json() {
        let plain = v1::Grant {
            reason: "yes".to_owned(),
            ..grant()
        };
        for message in [plain, grant()] {
            let value = dynamic("vnet.v1.Grant", &message).unwrap();
            let yaml = render(Format::Yaml, &value).unwrap();
            let json = render(Format::Json, &value).unwrap();

            let from_yaml: serde_json::Value = serde_saphyr::from_str(&yaml).unwrap();
            let from_json: serde_json::Value = serde_json::from_str(&json).unwrap();

            assert_eq!(from_yaml, from_json, "{yaml}");
            assert!(!yaml.contains('\u{202e}'), "{yaml}");
        }
    }
}

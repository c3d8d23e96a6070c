//! The policy file: from text with positions to a checked [`Policy`], or everything that is wrong with it.

use std::sync::Arc;

use vnet_proto::model::Target;

use crate::policy::effective::omitted_protocols;
use crate::policy::{FlowTest, NameSet, Policy, PolicyErrors, ProtocolSet, Rule, RuleAction};

/// Bytes that a document may have.
pub const DOCUMENT_BYTES_MAX: usize = 4 << 20;

/// Rules that a document may have.
pub const RULES_MAX: usize = 10_000;

impl Policy {
    /// Reads a document. `source` is its file's path, for messages.
    ///
    /// # Errors
    /// Everything that is wrong with it, in order of position.
    pub fn parse(_source: &str, _document: &str) -> Result<Self, PolicyErrors> {
        unimplemented!()
    }
}

/// The rule that an inline rule's target stands for.
pub(crate) fn rule_of_target(action: RuleAction, target: &Target) -> Rule {
    let unset = |ports: bool| {
        if ports {
            ProtocolSet::TCP_UDP
        } else {
            omitted_protocols(action)
        }
    };
    let (test, lookup_only) = match target {
        Target::Address {
            protocol,
            prefix,
            ports,
        } => {
            let protocols = protocol.map_or_else(|| unset(ports.is_some()), ProtocolSet::one);
            let ports = ports.iter().copied().collect();
            (
                FlowTest {
                    protocols,
                    prefixes: vec![*prefix],
                    ports,
                    names: None,
                },
                false,
            )
        }
        Target::Name {
            pattern,
            ports,
            lookup_only,
        } => {
            let names = Some(Arc::new(NameSet::from_iter([pattern.clone()])));
            let protocols = unset(ports.is_some());
            let ports = ports.iter().copied().collect();
            (
                FlowTest {
                    protocols,
                    prefixes: Vec::new(),
                    ports,
                    names,
                },
                *lookup_only,
            )
        }
    };
    Rule {
        label: format!("--{action} {target}"),
        action,
        test,
        lookup_only,
        vms: None,
        comment: String::new(),
        line: 0,
        column: 0,
    }
}

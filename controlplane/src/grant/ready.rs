//! The grants that reach one VM, made ready for decisions.

use std::sync::Arc;

use vnet_proto::model::{Budget, Target};

use super::{Grant, GrantAction, Lifetime};
use crate::policy::{FlowTest, NameSet, PrefixSet, ProtocolSet};

/// The grants that reach one VM, ready for decisions.
#[derive(Debug, Clone, Default)]
pub struct VmGrants {
    pub(crate) deny: Vec<ReadyGrant>,
    pub(crate) allow: Vec<ReadyGrant>,
    /// Those about forwards, which are about no flow and no lookup.
    pub(crate) forwards_denied: Vec<Arc<Grant>>,
    pub(crate) forwards_allowed: Vec<Arc<Grant>>,
    generation: u64,
}

impl VmGrants {
    /// From grants that all reach the VM.
    pub fn new(grants: impl IntoIterator<Item = Arc<Grant>>, generation: u64) -> Self {
        let is_allow = |grant: &Grant| grant.action == GrantAction::Allow;
        let (forwards, others): (Vec<_>, Vec<_>) = grants
            .into_iter()
            .partition(|grant| matches!(grant.target, Target::Forward(_)));
        let (mut forwards_allowed, forwards_denied): (Vec<_>, Vec<_>) =
            forwards.into_iter().partition(|grant| is_allow(grant));
        let (mut allow, deny): (Vec<_>, Vec<_>) = others
            .into_iter()
            .map(ReadyGrant::new)
            .partition(|ready| is_allow(&ready.grant));
        // Of several that allow, the one that limits least and lasts longest is used first, so that
        // a "once" is not spent where it was not needed.
        let order = |grant: &Grant| {
            let ends = grant.expires_at.map(std::cmp::Reverse);
            (
                grant.lifetime == Lifetime::Once,
                grant.budget != Budget::default(),
                ends.is_some(),
                ends,
            )
        };
        allow.sort_by_key(|ready| order(&ready.grant));
        forwards_allowed.sort_by_key(|grant| order(grant));
        Self {
            deny,
            allow,
            forwards_denied,
            forwards_allowed,
            generation,
        }
    }

    /// The [`generation`](super::Grants::generation) that it was made under.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

/// A grant with its target made into a test.
#[derive(Debug, Clone)]
pub(crate) struct ReadyGrant {
    pub(crate) grant: Arc<Grant>,
    pub(crate) test: FlowTest,
    /// Whether lookups are its business: never for a deny of some ports only.
    pub(crate) lookups: bool,
    /// Whether connections are.
    pub(crate) flows: bool,
}

impl ReadyGrant {
    pub(crate) fn new(grant: Arc<Grant>) -> Self {
        let unset = match grant.action {
            GrantAction::Allow => ProtocolSet::TCP_UDP,
            GrantAction::Deny => ProtocolSet::ALL,
        };
        let ported = |ports: Option<_>| {
            if ports.is_some() {
                ProtocolSet::TCP_UDP
            } else {
                unset
            }
        };
        let (test, lookups, flows) = match &grant.target {
            Target::Address {
                protocol,
                prefix,
                ports,
            } => {
                let protocols = match protocol {
                    Some(protocol) => ProtocolSet::one(*protocol),
                    None => ported(*ports),
                };
                let test = FlowTest {
                    protocols,
                    prefixes: PrefixSet::from_iter([*prefix]),
                    ports: ports.iter().copied().collect(),
                    names: None,
                };
                (test, false, true)
            }
            Target::Name {
                pattern,
                ports,
                lookup_only,
            } => {
                let test = FlowTest {
                    protocols: ported(*ports),
                    prefixes: PrefixSet::default(),
                    ports: ports.iter().copied().collect(),
                    names: Some(Arc::new(NameSet::from_iter([pattern.clone()]))),
                };
                // No answer about one port is an answer about the name; a yes to a port needs the lookup.
                let lookups = grant.action == GrantAction::Allow || ports.is_none();
                (test, lookups, !lookup_only)
            }
            Target::Forward(_) => (FlowTest::default(), false, false),
        };
        Self {
            grant,
            test,
            lookups,
            flows,
        }
    }
}

//! Which named policy a VM is under, and what it is under altogether.
//!
//! Where that cannot be told, nothing is let out: two policies may claim one VM, though applying the second is
//! refused while that can be seen, and a document that an earlier version stored may be none that this one reads.
//! Whom such a document claims is not known, so that it may be for any VM that no other policy claims.

use vnet_proto::model::Mode;

use super::State;
use super::policies::{DEFAULT, NamedPolicy};
use crate::clock::Now;
use crate::fleet::Vm;
use crate::grant::VmView;
use crate::policy::{Effective, Modes, Policy, PolicyInForce, Unsettled, claimants};
use crate::refusal::Refusal;

/// Policies that a sentence names one by one.
const NAMED_MAX: usize = 3;

impl State {
    /// What a VM is under.
    pub(super) fn compose(&self, now: Now, vm: &Vm) -> Effective {
        let own = vm.own_policy.as_deref();
        let own_document = own.and_then(|o| o.document());
        let set = Option::<Mode>::try_from(vm.set.mode).unwrap_or_default();
        let (claimed, unsettled) = match self.policy_for(&vm.view) {
            Ok(claimed) => (claimed, None),
            // Its own document is in the place of any, and a mode that somebody set is that.
            Err(why) => (None, (own_document.is_none() && set.is_none()).then_some(why)),
        };
        let document_mode = own_document
            .or(claimed.map(|c| c.policy))
            .and_then(|p| p.mode_of(&vm.view));
        let secure = self.secure_mode && !matches!(document_mode, Some(Mode::Block | Mode::Quarantine));
        let modes = Modes {
            set: set.or(unsettled.is_some().then_some(Mode::Block)),
            own: vm.own_mode.or(secure.then_some(Mode::Ask)),
        };
        Effective::compose(now, &vm.view, claimed, own, modes)
            .with_ec2_metadata_access(vm.ec2_metadata_access)
            .with_unsettled(unsettled)
    }

    /// The named policy that a VM falls to, if it falls to any.
    fn policy_for(&self, vm: &VmView) -> Result<Option<PolicyInForce<'_>>, Unsettled> {
        let claims = claimants(vm, self.readable());
        match claims.as_slice() {
            [] => {}
            [one] => return Ok(self.policies.get_key_value(*one).and_then(in_force)),
            // Refused when applied; a VM that came later, or a label, can still bring it about.
            several => return Err(claimed_by_several(vm, several)),
        }
        let unreadable = self.policies.iter().filter(|(_, named)| named.is_unreadable());
        let unreadable: Vec<_> = unreadable.collect();
        if unreadable.is_empty() {
            Ok(self.policies.get_key_value(DEFAULT).and_then(in_force))
        } else {
            Err(unread(vm, &unreadable))
        }
    }

    fn readable(&self) -> impl Iterator<Item = (&str, &Policy)> {
        let policies = self.policies.iter();
        policies.filter_map(|(name, named)| Some((name.as_str(), named.parsed.as_deref()?)))
    }

    /// Refuses a candidate that claims a VM which another policy claims.
    pub(super) fn check_claims(&self, name: &str, candidate: &Policy) -> Result<(), Refusal> {
        for vm in self.fleet.vms.values() {
            let others = self.readable().filter(|(other, _)| *other != name);
            let claims = claimants(&vm.view, others.chain([(name, candidate)]));
            if claims.len() > 1 && claims.contains(&name) {
                return Err(Refusal::Precondition {
                    reason: "CLAIMED_TWICE",
                    text: format!(
                        "VM {} would be claimed by several policies: {}; narrow one's appliesTo",
                        vm.view.name,
                        claims.join(", ")
                    ),
                });
            }
        }
        Ok(())
    }
}

fn in_force<'a>((name, named): (&'a String, &'a NamedPolicy)) -> Option<PolicyInForce<'a>> {
    let policy = named.parsed.as_deref()?;
    Some(PolicyInForce {
        name,
        revision: named.message.revision,
        policy,
    })
}

fn claimed_by_several(vm: &VmView, claims: &[&str]) -> Unsettled {
    let names = claims.iter().map(|name| (*name).to_owned());
    Unsettled {
        why: format!("policies {} claim {}", listed(names), vm.name),
        until: "all but one of them are narrowed",
        remedy: "narrow appliesTo in one of their files, and vnetctl policy apply FILE --name NAME"
            .to_owned(),
    }
}

fn unread(vm: &VmView, unreadable: &[(&String, &NamedPolicy)]) -> Unsettled {
    let names = unreadable.iter();
    let names = names.map(|(name, named)| format!("{name} (revision {})", named.message.revision));
    let (policies, until) = match unreadable.len() {
        1 => ("policy", "it is applied anew"),
        _ => ("policies", "they are applied anew"),
    };
    let first = unreadable.first().map_or(DEFAULT, |(name, _)| name.as_str());
    Unsettled {
        why: format!(
            "{policies} {} cannot be read by this version, and may be for {}",
            listed(names),
            vm.name
        ),
        until,
        remedy: format!(
            "vnetctl policy apply FILE --name {first} (vnetctl policy show --name {first} prints what is stored, \
             vnetctl policy check what is wrong with it)"
        ),
    }
}

/// The first of some names, and how many more there are.
fn listed(names: impl ExactSizeIterator<Item = String>) -> String {
    let more = names.len().saturating_sub(NAMED_MAX);
    let mut text = names.take(NAMED_MAX).collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

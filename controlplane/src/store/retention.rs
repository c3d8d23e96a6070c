//! How much history is kept, and of what.
//!
//! What people did, what came and went, and what guests do have room of their own each, so that no
//! guest can push out who allowed what by opening and closing connections. Of what guests do, one VM
//! has a part only, so that none can push out another's. In each part the oldest go first.

use std::collections::BTreeMap;

use vnet_proto::v1;

/// Events kept of what people did: grants, policies, modes and labels, forwards, answers.
pub const HISTORY_ACTS_MAX: u64 = 50_000;
/// Events kept of VMs and dataplanes that came and went.
pub const HISTORY_PRESENCE_MAX: u64 = 10_000;
/// Events kept of what guests do: flows, lookups, questions, limits reached.
pub const HISTORY_TRAFFIC_MAX: u64 = 100_000;
/// Of these, events of one VM, by its name.
pub const HISTORY_TRAFFIC_PER_VM_MAX: u64 = 25_000;

/// A part of the history that has room of its own. The numbers are the store's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// What people did.
    Acts = 0,
    /// What came and went.
    Presence = 1,
    /// What guests do. A kind that is not known is taken for it: it has the least claim.
    Traffic = 2,
}

impl Class {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Acts, Self::Presence, Self::Traffic];

    /// Where an event belongs.
    pub fn of(event: &v1::Event) -> Self {
        use v1::EventKind as Kind;
        match event.kind() {
            Kind::GrantCreated
            | Kind::GrantEnded
            | Kind::GrantUsedUp
            | Kind::PolicyApplied
            | Kind::VmUpdated
            | Kind::ForwardChanged => Self::Acts,
            // A question that somebody answered; one that went away by itself is the guest's doing.
            Kind::PendingClosed if matches!(event.action(), v1::Action::Allow | v1::Action::Deny) => {
                Self::Acts
            }
            Kind::VmAttached
            | Kind::VmDetached
            | Kind::DataplaneConnected
            | Kind::DataplaneLost
            | Kind::HistoryCutOff => Self::Presence,
            Kind::FlowOpened
            | Kind::FlowClosed
            | Kind::FlowDenied
            | Kind::DnsAllowed
            | Kind::DnsDenied
            | Kind::ForwardDenied
            | Kind::PendingOpened
            | Kind::PendingClosed
            | Kind::LimitReached
            | Kind::Gap
            | Kind::Unspecified => Self::Traffic,
        }
    }

    /// How many are kept.
    pub const fn limit(self) -> u64 {
        match self {
            Self::Acts => HISTORY_ACTS_MAX,
            Self::Presence => HISTORY_PRESENCE_MAX,
            Self::Traffic => HISTORY_TRAFFIC_MAX,
        }
    }
}

/// How many events of each part are kept, so that what is too many is known without counting.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Census {
    classes: [u64; Class::ALL.len()],
    /// Of the traffic, by VM.
    vms: BTreeMap<String, u64>,
}

impl Census {
    pub(super) fn add(&mut self, class: Class, vm: &str, count: u64) {
        self.classes[class as usize] += count;
        if class == Class::Traffic {
            match self.vms.get_mut(vm) {
                Some(of_vm) => *of_vm += count,
                None => {
                    self.vms.insert(vm.to_owned(), count);
                }
            }
        }
    }

    pub(super) fn remove(&mut self, class: Class, vm: &str, count: u64) {
        let all = &mut self.classes[class as usize];
        *all = all.saturating_sub(count);
        if class == Class::Traffic
            && let Some(of_vm) = self.vms.get_mut(vm)
        {
            *of_vm = of_vm.saturating_sub(count);
            if *of_vm == 0 {
                self.vms.remove(vm);
            }
        }
    }

    /// How many of a VM's traffic are too many.
    pub(super) fn excess_of_vm(&self, vm: &str) -> u64 {
        let kept = self.vms.get(vm).copied().unwrap_or(0);
        kept.saturating_sub(HISTORY_TRAFFIC_PER_VM_MAX)
    }

    /// How many of a part are too many.
    pub(super) fn excess(&self, class: Class) -> u64 {
        self.classes[class as usize].saturating_sub(class.limit())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_did_is_apart_from_what_guests_do() {
        let of = |kind: v1::EventKind, action: v1::Action| {
            Class::of(&v1::Event {
                kind: kind.into(),
                action: action.into(),
                ..Default::default()
            })
        };
        let none = v1::Action::Unspecified;
        for kind in [
            v1::EventKind::GrantCreated,
            v1::EventKind::GrantEnded,
            v1::EventKind::PolicyApplied,
            v1::EventKind::VmUpdated,
            v1::EventKind::ForwardChanged,
        ] {
            assert_eq!(of(kind, none), Class::Acts, "{kind:?}");
        }
        let closed = v1::EventKind::PendingClosed;
        assert_eq!(of(closed, v1::Action::Allow), Class::Acts);
        assert_eq!(of(closed, v1::Action::Deny), Class::Acts);
        assert_eq!(of(closed, none), Class::Traffic, "the guest gave up");
        assert_eq!(of(v1::EventKind::VmDetached, none), Class::Presence);
        assert_eq!(of(v1::EventKind::FlowDenied, v1::Action::Deny), Class::Traffic);
        assert_eq!(of(v1::EventKind::PendingOpened, v1::Action::Ask), Class::Traffic);
    }
}

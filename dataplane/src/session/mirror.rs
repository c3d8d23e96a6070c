//! The mirror: what a reconnect must say again, kept from the drivers' reports so that no driver is asked.
//!
//! Guests, misses that wait, live flows with their counts, bindings, uses of budgets. Drivers bound their own tables; the
//! mirror has limits of its own, so that many guests together cannot grow the process without end.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use vnet_proto::model::{Budget, Epoch, FlowId, Miss, MissId, Name, VmId};
use vnet_proto::v1;

use crate::message::{FlowOpened, VmStatus, VmUp, flow_id, miss_id};
use crate::metrics::MirrorTable;
use crate::session::wire;

/// How much is mirrored at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) misses: usize,
    pub(super) flows: usize,
    pub(super) bindings: usize,
    pub(super) uses: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            misses: MISSES_MAX,
            flows: FLOWS_MAX,
            bindings: BINDINGS_MAX,
            uses: USES_MAX,
        }
    }
}

/// A table was full; the entry is not mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Full(pub(super) MirrorTable);

#[derive(Debug, Default)]
pub(super) struct Mirror {
    limits: Limits,
    vms: BTreeMap<VmId, Vm>,
    // Ordered by id, hence by guest: a guest that goes away takes one range.
    misses: BTreeMap<MissId, Held>,
    flows: BTreeMap<FlowId, Flow>,
    bindings: HashMap<(VmId, Name), Binding>,
    /// Also of guests that are gone, until a Hello has told them.
    uses: BTreeMap<(VmId, String), Budget>,
}

#[derive(Debug)]
struct Vm {
    up: VmUp,
    status: Option<VmStatus>,
}

#[derive(Debug)]
pub(super) struct Held {
    pub(super) miss: Miss,
    deadline: Instant,
}

impl Held {
    /// The miss for the wire, with what is left of its hold.
    pub(super) fn to_message(&self, now: Instant, epoch: Option<Epoch>) -> v1::Miss {
        v1::Miss {
            hold: wire::duration(wire::remaining(self.deadline, now)),
            ..self.miss.to_message(epoch)
        }
    }
}

#[derive(Debug)]
struct Flow {
    opened: FlowOpened,
    bytes_up: u64,
    bytes_down: u64,
}

#[derive(Debug)]
struct Binding {
    addresses: Vec<IpAddr>,
    expires_at: Instant,
}

impl Mirror {
    pub(super) fn with_limits(limits: Limits) -> Self {
        Self {
            limits,
            ..Self::default()
        }
    }

    pub(super) fn vm_up(&mut self, up: VmUp) {
        self.vms.insert(up.vm, Vm { up, status: None });
    }

    /// A guest goes by this name. Said again, it is the one: to a controlplane that was started anew, whoever asked for
    /// the same name and came first would otherwise have what holds for the other.
    pub(super) fn named(&mut self, vm: VmId, name: &str) {
        if let Some(vm) = self.vms.get_mut(&vm).filter(|_| !name.is_empty()) {
            name.clone_into(&mut vm.up.name);
        }
    }

    pub(super) fn vm_status(&mut self, status: VmStatus) {
        if let Some(vm) = self.vms.get_mut(&status.vm) {
            vm.status = Some(status);
        }
    }

    /// Forgets a guest and everything of it.
    pub(super) fn vm_down(&mut self, vm: VmId) {
        self.vms.remove(&vm);
        remove_range(&mut self.misses, miss_id(vm, 0)..=miss_id(vm, u64::MAX));
        remove_range(&mut self.flows, flow_id(vm, 0)..=flow_id(vm, u64::MAX));
        self.bindings.retain(|(owner, _), _| *owner != vm);
    }

    /// What a guest has used of a grant, in all.
    pub(super) fn used(&mut self, vm: VmId, grant: &str, used: Budget) -> Result<(), Full> {
        if let Some(known) = self.uses.get_mut(&(vm, grant.to_owned())) {
            *known = used;
            return Ok(());
        }
        if self.uses.len() >= self.limits.uses {
            let vms = &self.vms;
            let gone = self.uses.keys().find(|(owner, _)| !vms.contains_key(owner));
            let gone = gone.cloned().ok_or(Full(MirrorTable::Uses))?;
            self.uses.remove(&gone);
        }
        self.uses.insert((vm, grant.to_owned()), used);
        Ok(())
    }

    /// A grant has ended: nobody wants to know what was used of it.
    pub(super) fn grant_ended(&mut self, vm: VmId, grant: &str) {
        self.uses.remove(&(vm, grant.to_owned()));
    }

    /// A Hello was heard: what guests used that are gone is known.
    pub(super) fn uses_told(&mut self) {
        let vms = &self.vms;
        self.uses.retain(|(owner, _), _| vms.contains_key(owner));
    }

    /// What guests have used of grants.
    pub(super) fn uses(&self) -> impl Iterator<Item = v1::GrantUse> {
        self.uses
            .iter()
            .map(|((vm, grant), used)| wire::grant_use(*vm, grant, *used))
    }

    /// How long a guest's resolver waits, if the guest is known.
    pub(super) fn resolver_patience(&self, vm: VmId) -> Option<Duration> {
        self.vms.get(&vm).map(|vm| vm.up.resolver_patience)
    }

    pub(super) fn miss(&mut self, miss: Miss, now: Instant) -> Result<(), Full> {
        if self.misses.len() >= self.limits.misses && !self.misses.contains_key(&miss.id) {
            return Err(Full(MirrorTable::Misses));
        }
        let deadline = now + miss.hold;
        self.misses.insert(miss.id, Held { miss, deadline });
        Ok(())
    }

    pub(super) fn held(&mut self, miss: MissId, hold: Duration, now: Instant) {
        if let Some(held) = self.misses.get_mut(&miss) {
            held.deadline = now + hold;
        }
    }

    pub(super) fn held_miss(&self, miss: MissId) -> Option<&Held> {
        self.misses.get(&miss)
    }

    pub(super) fn miss_ended(&mut self, miss: MissId) {
        self.misses.remove(&miss);
    }

    pub(super) fn flow_opened(&mut self, opened: FlowOpened) -> Result<(), Full> {
        if self.flows.len() >= self.limits.flows {
            return Err(Full(MirrorTable::Flows));
        }
        self.flows.insert(
            opened.flow,
            Flow {
                opened,
                bytes_up: 0,
                bytes_down: 0,
            },
        );
        Ok(())
    }

    pub(super) fn flow_counted(&mut self, flow: FlowId, bytes_up: u64, bytes_down: u64) {
        if let Some(flow) = self.flows.get_mut(&flow) {
            (flow.bytes_up, flow.bytes_down) = (bytes_up, bytes_down);
        }
    }

    pub(super) fn flow_closed(&mut self, flow: FlowId) {
        self.flows.remove(&flow);
    }

    pub(super) fn binding(
        &mut self,
        vm: VmId,
        name: Name,
        addresses: Vec<IpAddr>,
        expires_in: Duration,
        now: Instant,
    ) -> Result<(), Full> {
        let key = (vm, name);
        if self.bindings.len() >= self.limits.bindings && !self.bindings.contains_key(&key) {
            self.bindings.retain(|_, binding| binding.expires_at > now);
            if self.bindings.len() >= self.limits.bindings {
                return Err(Full(MirrorTable::Bindings));
            }
        }
        self.bindings.insert(
            key,
            Binding {
                addresses,
                expires_at: now + expires_in,
            },
        );
        Ok(())
    }

    pub(super) fn misses_len(&self) -> usize {
        self.misses.len()
    }

    pub(super) fn flows_len(&self) -> usize {
        self.flows.len()
    }

    /// Whether there is no guest.
    pub(super) fn is_empty(&self) -> bool {
        self.vms.is_empty()
    }

    /// Guests, by handle.
    pub(super) fn vms(&self) -> impl Iterator<Item = v1::VmUp> {
        self.vms
            .values()
            .map(|vm| wire::vm_up(&vm.up, vm.status.as_ref()))
    }

    /// What guests claim and cannot be told with [`Self::vms`].
    pub(super) fn statuses(&self) -> impl Iterator<Item = v1::VmStatus> {
        self.vms
            .values()
            .filter_map(|vm| vm.status.as_ref())
            .map(wire::vm_status)
    }

    /// Misses that still wait, oldest of each guest first.
    pub(super) fn misses(&self, now: Instant) -> impl Iterator<Item = &Held> {
        self.misses.values().filter(move |held| held.deadline > now)
    }

    /// Live flows with their counts.
    pub(super) fn flows(&self) -> impl Iterator<Item = v1::FlowOpened> {
        self.flows
            .values()
            .map(|flow| wire::flow_opened(&flow.opened, flow.bytes_up, flow.bytes_down))
    }

    /// Bindings in force, with what is left of them.
    pub(super) fn bindings(&self, now: Instant) -> impl Iterator<Item = v1::BindingLearned> {
        self.bindings
            .iter()
            .filter(move |(_, binding)| binding.expires_at > now)
            .map(move |((vm, name), binding)| {
                wire::binding(
                    *vm,
                    name,
                    &binding.addresses,
                    wire::remaining(binding.expires_at, now),
                )
            })
    }
}

fn remove_range<K: Ord + Copy, V>(map: &mut BTreeMap<K, V>, range: std::ops::RangeInclusive<K>) {
    let gone: Vec<K> = map.range(range).map(|(key, _)| *key).collect();
    for key in gone {
        map.remove(&key);
    }
}

/// Misses of all guests. One beyond is not announced again after a reconnect; it ends at its deadline.
const MISSES_MAX: usize = 65_536;
/// Flows of all guests. One beyond is cut: a controlplane that never hears of it again could not.
const FLOWS_MAX: usize = 262_144;
/// Bindings of all guests.
const BINDINGS_MAX: usize = 65_536;
/// Uses of budgets of all guests. One beyond is not told again after a reconnect, but with its next change.
const USES_MAX: usize = 65_536;

//! VMs as people see and change them: lists, labels, modes.

use std::collections::BTreeMap;
use std::sync::Arc;

use vnet_proto::model::{Mode, VmSelector, label_key_problem, label_problem};
use vnet_proto::v1;

use super::events::about;
use super::{Hub, State, Ticket};
use crate::clock::Now;
use crate::convert;
use crate::fleet::{Fleet, Vm, no_vm};
use crate::refusal::Refusal;
use crate::store::{Durable, StoredVm, Write};
use crate::watch::Watch;

/// Labels of one VM.
const LABELS_MAX: usize = 64;

/// What to change about a VM.
#[derive(Debug)]
pub struct VmUpdate<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its mode from now; `None`: as it is.
    pub mode: Option<Mode>,
    /// Labels to set; an empty value removes one.
    pub labels: BTreeMap<String, String>,
    /// If not empty, the etag that it must have.
    pub etag: &'a str,
    /// Who changes it.
    pub actor: &'a str,
}

/// Which VMs a list is of. Both must agree.
#[derive(Debug, Clone, Copy, Default)]
pub struct Which<'a> {
    /// Those that are selected; `None`: all.
    pub vms: Option<&'a VmSelector>,
    /// Those on this network; empty: all.
    pub network: &'a str,
}

impl Which<'_> {
    /// Whether something of a VM is in the list, by the name and labels that the VM has there. Of a network are the VMs
    /// that are there.
    pub(super) fn has(&self, fleet: &Fleet, name: &str, labels: &BTreeMap<String, String>) -> bool {
        (self.network.is_empty() || fleet.network_of(name) == Some(self.network))
            && self.vms.is_none_or(|selector| selector.matches(name, labels))
    }
}

impl Hub {
    /// VMs, by name.
    pub fn vms(&self, which: Which<'_>) -> Vec<v1::Vm> {
        self.read(|state, _| state.selected(which).map(|vm| state.vm_message(vm)).collect())
    }

    /// One VM.
    ///
    /// # Errors
    /// [`Refusal::NotFound`].
    pub fn vm(&self, name: &str) -> Result<v1::Vm, Refusal> {
        self.read(|state, _| {
            let name = state.only_vm(name)?;
            state
                .fleet
                .vms
                .get(&name)
                .map(|vm| state.vm_message(vm))
                .ok_or(Refusal::NotFound(name))
        })
    }

    /// Every VM, then each change.
    ///
    /// # Errors
    /// [`Refusal::Limit`] if too many watch.
    pub fn watch_vms(&self, filter: Option<VmSelector>) -> Result<Watch<v1::WatchVmsResponse>, Refusal> {
        self.read(|state, _| {
            let response = |change: v1::VmChange, vm| v1::WatchVmsResponse {
                change: change.into(),
                vm,
            };
            let mut first: Vec<_> = state
                .fleet
                .vms
                .values()
                .filter(|vm| {
                    filter
                        .as_ref()
                        .is_none_or(|f| f.matches(&vm.view.name, &vm.view.labels))
                })
                .map(|vm| response(v1::VmChange::Added, Some(state.vm_message(vm))))
                .collect();
            first.push(response(v1::VmChange::Synced, None));
            state.vm_watches.add(filter, first)
        })
    }

    /// Changes labels or mode.
    ///
    /// # Errors
    /// [`Refusal`]: nothing changed.
    pub fn update_vm(&self, update: VmUpdate<'_>) -> Result<(v1::Vm, Ticket, Durable), Refusal> {
        let (result, durable) = self.with(|state, now| state.update_vm(now, update));
        result.map(|(vm, ticket)| (vm, ticket, durable))
    }
}

impl State {
    fn vm_message(&self, vm: &Vm) -> v1::Vm {
        let pending = self.pending.open_count_of(&vm.view.instance) as u64;
        convert::vm(vm, self.fleet.dataplanes.get(&vm.dataplane), pending)
    }

    pub(super) fn publish_vm(&mut self, change: v1::VmChange, name: &str) {
        if self.vm_watches.is_empty() {
            return;
        }
        let Some(vm) = self.fleet.vms.get(name) else {
            return;
        };
        let response = Arc::new(v1::WatchVmsResponse {
            change: change.into(),
            vm: Some(self.vm_message(vm)),
        });
        let view = &vm.view;
        self.vm_watches.publish(|filter| {
            let lets = filter
                .as_ref()
                .is_none_or(|f| f.matches(&view.name, &view.labels));
            lets.then(|| Arc::clone(&response))
        });
    }

    fn update_vm(&mut self, now: Now, update: VmUpdate<'_>) -> Result<(v1::Vm, Ticket), Refusal> {
        let missing = || no_vm(update.name);
        let Some(vm) = self.fleet.vms.get(update.name) else {
            return self.lift_quarantine(now, &update).ok_or_else(missing);
        };
        if !update.etag.is_empty() && convert::vm_etag(vm) != update.etag {
            return Err(Refusal::Changed(format!(
                "VM {} changed since it was read; read it again",
                update.name
            )));
        }
        for (key, value) in &update.labels {
            // An empty value removes. What is there already can always be removed, as an earlier version took it.
            let removes = value.is_empty() && vm.view.labels.contains_key(key);
            let problem = match value.as_str() {
                _ if removes => None,
                "" => label_key_problem(key),
                value => label_problem(key, value),
            };
            if let Some(why) = problem {
                return Err(Refusal::field(
                    "labels",
                    format!("{:?} {why}", format!("{key}={value}")),
                ));
            }
        }
        let mut set = StoredVm {
            instance: vm.view.instance.0.clone(),
            ..vm.set.clone()
        };
        set.labels.extend(update.labels.clone());
        if set.labels.len() > LABELS_MAX {
            return Err(Refusal::field(
                "labels",
                format!("a VM has at most {LABELS_MAX} of them"),
            ));
        }
        if let Some(mode) = update.mode {
            set.mode = mode.into();
        }
        let labels = Vm::merged_labels(&vm.host_labels, &set);
        self.set.insert(update.name.to_owned(), set.clone());
        self.writes
            .push(Write::PutVm(update.name.to_owned(), Some(set.clone())));
        if let Some(vm) = self.fleet.vms.get_mut(update.name) {
            vm.view.labels = labels;
            vm.set = set;
            // Labels decide which grants reach it.
            vm.grants = self.grants.for_vm(&vm.view);
        }
        self.recompose(now, update.name);
        let mut parts = Vec::new();
        if let Some(mode) = update.mode {
            parts.push(format!("mode {mode}"));
        }
        parts.extend(update.labels.iter().map(|(k, v)| format!("label {k}={v}")));
        let event = about(
            v1::EventKind::VmUpdated,
            update.name,
            format!("{}: {}", update.name, parts.join(", ")),
        );
        self.event(
            now,
            v1::Event {
                actor: update.actor.to_owned(),
                ..event
            },
        );
        self.publish_vm(v1::VmChange::Updated, update.name);
        let ticket = self.ticket();
        // Other guests of its network may be open to it, or not, by its mode.
        let dataplane = self.fleet.vms.get(update.name).map(|vm| vm.dataplane);
        let name = update.name;
        self.change(
            now,
            Some(&ticket),
            |vm| vm.view.name == name || Some(vm.dataplane) == dataplane,
            "the VM's mode or labels changed",
        );
        let vm = self.fleet.vms.get(update.name).ok_or_else(missing)?;
        Ok((self.vm_message(vm), ticket))
    }

    /// A quarantine sticks to a name whose VM is gone; a mode set for that name lifts it.
    fn lift_quarantine(&mut self, now: Now, update: &VmUpdate<'_>) -> Option<(v1::Vm, Ticket)> {
        let quarantined = self
            .set
            .get(update.name)
            .is_some_and(|set| set.mode == v1::Mode::Quarantine);
        let mode = update
            .mode
            .filter(|mode| quarantined && *mode != Mode::Quarantine)?;
        if self.is_awaited(update.name)
            && let Some(set) = self.set.get_mut(update.name)
        {
            // Its VM may come back, and has the name until then.
            set.mode = mode.into();
            self.writes
                .push(Write::PutVm(update.name.to_owned(), Some(set.clone())));
        } else {
            self.set.remove(update.name);
            self.writes.push(Write::PutVm(update.name.to_owned(), None));
        }
        let event = about(
            v1::EventKind::VmUpdated,
            update.name,
            format!("{}: quarantine lifted", update.name),
        );
        self.event(
            now,
            v1::Event {
                actor: update.actor.to_owned(),
                ..event
            },
        );
        let ticket = self.ticket();
        self.change(now, Some(&ticket), |_| false, "");
        let vm = v1::Vm {
            name: update.name.to_owned(),
            mode: v1::Mode::from(mode).into(),
            ..Default::default()
        };
        Some((vm, ticket))
    }
}

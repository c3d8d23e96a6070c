//! Which VM goes by which name.
//!
//! Rules, grants and quarantines are said of names. So that nobody has another's by being quicker after a start of the
//! controlplane, the names of VMs that were attached before it are kept for them until they are back, as long as a lost
//! dataplane's are. Whoever asks for one meanwhile is numbered, unless the process that had it has ended: then nobody
//! comes back to it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::SystemTime;

use tonic::Status;
use vnet_proto::v1;

use super::State;
use crate::clock::Now;
use crate::fleet::{VMS_MAX, numbered};
use crate::grant::VmInstance;
use crate::process;
use crate::store::{StoredVm, Write};

/// Whether the process that a VM is of is there, as far as is known: it was told, and is not known to have ended.
fn lives_on(kept: &StoredVm) -> bool {
    !kept.process.is_empty() && !process::has_ended(&kept.process)
}

/// Attachments of an earlier life, whose VMs may come back.
#[derive(Debug)]
pub(super) struct Awaited {
    until: SystemTime,
    /// Those that had names, with them.
    named: HashMap<VmInstance, String>,
    /// Those that only grants know.
    others: HashSet<VmInstance>,
}

impl Awaited {
    /// Those that grants and names were bound to; `None` if there are none.
    pub(super) fn new(
        until: SystemTime,
        mut others: HashSet<VmInstance>,
        set: &BTreeMap<String, StoredVm>,
    ) -> Option<Self> {
        let named: HashMap<VmInstance, String> = set
            .iter()
            .filter(|(_, set)| !set.instance.is_empty())
            .map(|(name, set)| (VmInstance(set.instance.clone()), name.clone()))
            .collect();
        others.retain(|instance| !named.contains_key(instance));
        (!named.is_empty() || !others.is_empty()).then_some(Self { until, named, others })
    }

    /// It is back, or never will be. Says the name that was kept for it.
    fn remove(&mut self, instance: &VmInstance) -> Option<String> {
        self.others.remove(instance);
        self.named.remove(instance)
    }
}

impl State {
    /// The name of a VM that attaches: the one that is kept for it, else the one that it wants, numbered if another has
    /// it.
    pub(super) fn name_for(
        &mut self,
        now: Now,
        instance: &VmInstance,
        wanted: &str,
    ) -> Result<String, Status> {
        if let Some(name) = self.awaited.as_mut().and_then(|a| a.remove(instance))
            && !self.fleet.vms.contains_key(&name)
        {
            return Ok(name);
        }
        // Whoever had the name and is lost makes room, unless its dataplane's process is there: it was started again,
        // most likely.
        if let Some(lost) = self.fleet.vms.get(wanted).filter(|vm| vm.lost)
            && !self.set.get(wanted).is_some_and(lives_on)
        {
            let (number, handle) = (lost.dataplane, lost.handle);
            self.vm_down(now, number, handle, String::new());
        }
        // Likewise whoever had it before the controlplane was started, where its dataplane has ended for sure.
        if self.is_awaited(wanted) {
            self.let_go_of_ended(now, wanted);
        }
        // Those that are awaited find room when they come.
        let awaited = self.awaited.as_ref().map_or(0, |awaited| awaited.named.len());
        if self.fleet.vms.len() + awaited >= VMS_MAX {
            self.metrics.limits_reached.add(1);
            return Err(Status::resource_exhausted(format!(
                "{VMS_MAX} VMs are known, which is the limit"
            )));
        }
        let taken = |name: &str| self.fleet.vms.contains_key(name) || self.is_awaited(name);
        let name = numbered(wanted, taken);
        if name != wanted {
            tracing::warn!(
                vm = name,
                wanted,
                "the VM's name is in use by another VM: what is said of that one does not hold for this one"
            );
        }
        Ok(name)
    }

    /// If the process that had a name has ended, none of its VMs comes back.
    fn let_go_of_ended(&mut self, now: Now, name: &str) {
        let process = self.set.get(name).map(|kept| kept.process.clone());
        let Some(process) = process.filter(|process| process::has_ended(process)) else {
            return;
        };
        let Some(awaited) = &mut self.awaited else { return };
        let is_its = |name: &str| self.set.get(name).is_some_and(|kept| kept.process == process);
        let gone: Vec<_> = awaited.named.extract_if(|_, name| is_its(name)).collect();
        for (instance, name) in gone {
            self.instance_stopped(now, &instance, &name);
        }
    }

    /// Whether a name is kept for a VM that may come back.
    pub(super) fn is_awaited(&self, name: &str) -> bool {
        let kept = self.set.get(name).map(|set| &set.instance);
        let named = self.awaited.as_ref().map(|awaited| &awaited.named);
        kept.zip(named)
            .is_some_and(|(instance, named)| named.contains_key(&VmInstance(instance.clone())))
    }

    /// Keeps that a VM has a name, and says what is set for it.
    pub(super) fn keep(
        &mut self,
        name: &str,
        instance: &VmInstance,
        wanted: &str,
        process: String,
    ) -> StoredVm {
        let before = self.set.get(name).filter(|set| set.instance == instance.0);
        let kept = match before {
            // One that comes again says the name that it was given, not the one that it wanted.
            Some(before) => StoredVm {
                process,
                ..before.clone()
            },
            // All but quarantine was set for one attachment.
            None => StoredVm {
                mode: (self.set.get(name).map(|set| set.mode))
                    .filter(|mode| *mode == v1::Mode::Quarantine)
                    .unwrap_or_default(),
                labels: BTreeMap::new(),
                instance: instance.0.clone(),
                wanted: if name == wanted {
                    String::new()
                } else {
                    wanted.to_owned()
                },
                process,
            },
        };
        if before != Some(&kept) {
            self.set.insert(name.to_owned(), kept.clone());
            self.writes
                .push(Write::PutVm(name.to_owned(), Some(kept.clone())));
        }
        kept
    }

    /// A VM is gone for good: of what is kept by its name only a quarantine stays, for whoever has the name next.
    pub(super) fn forget_attachment(&mut self, instance: &VmInstance, name: &str) {
        let Some(kept) = self.set.get_mut(name).filter(|set| set.instance == instance.0) else {
            return;
        };
        let quarantine = (kept.mode == v1::Mode::Quarantine).then(|| StoredVm {
            instance: String::new(),
            wanted: String::new(),
            process: String::new(),
            ..kept.clone()
        });
        match &quarantine {
            Some(quarantine) => kept.clone_from(quarantine),
            None => _ = self.set.remove(name),
        }
        self.writes.push(Write::PutVm(name.to_owned(), quarantine));
    }

    /// Those that are not back by now will not be awaited any more.
    pub(super) fn await_no_longer(&mut self, now: Now) {
        if self.awaited.as_ref().is_none_or(|a| a.until > now.steady) {
            return;
        }
        let Some(awaited) = self.awaited.take() else {
            return;
        };
        let others = awaited
            .others
            .into_iter()
            .map(|instance| (instance, String::new()));
        for (instance, name) in awaited.named.into_iter().chain(others) {
            self.instance_stopped(now, &instance, &name);
        }
    }
}

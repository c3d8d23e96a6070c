//! The history as policies can be asked about it: events of what guests did become flows and lookups again,
//! and grants that were made become grants.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use vnet_proto::model::{
    FlowKey, FlowSubject, Guard, GuardSet, LookupSubject, Name, Protocol, Reason, Subject, VmId, VmSelector,
};
use vnet_proto::v1;

use super::Hub;
use crate::convert;
use crate::fleet::{DataplaneNo, Vm};
use crate::grant::{Grant, VmInstance, VmView};
use crate::policy::{GuardedRanges, Outcome};
use crate::refusal::Refusal;
use crate::replay::{LeftOut, Recorded, RecordedVm};
use crate::store::{EventQuery, StoredGrant};

/// Events read at once.
const CHUNK: usize = 1_000;

/// Which part of the history.
#[derive(Debug, Clone, Copy, Default)]
pub struct Span {
    /// From then on; `None`: from the beginning.
    pub start: Option<SystemTime>,
    /// Before then; `None`: to the end.
    pub end: Option<SystemTime>,
}

/// What an event is to a policy: something that it can be asked about, or so many that it cannot, and why.
pub type Recalled = Result<Recorded, (LeftOut, u64)>;

/// Makes recorded VMs of names. Labels are those that the VM has now, or that were set for its name.
struct Asked {
    vms: HashMap<String, Arc<RecordedVm>>,
    dataplanes: HashMap<DataplaneNo, Arc<GuardedRanges>>,
    /// For VMs that are gone: what a network of the default form guards, and every network that is there.
    elsewhere: Arc<GuardedRanges>,
}

impl Hub {
    /// Hands every flow, lookup and question of these VMs' history to `take`, oldest first.
    ///
    /// # Errors
    /// [`Refusal`] if the history cannot be read.
    pub async fn recall(
        &self,
        filter: Option<&VmSelector>,
        span: Span,
        mut take: impl FnMut(Recalled),
    ) -> Result<(), Refusal> {
        let mut asked = self.asked();
        let kinds = [
            v1::EventKind::FlowOpened,
            v1::EventKind::FlowDenied,
            v1::EventKind::DnsAllowed,
            v1::EventKind::DnsDenied,
            v1::EventKind::PendingOpened,
        ];
        self.each_event(&kinds, span, |event| {
            let vm = self.recorded_vm(&mut asked, &event.vm);
            let selected = filter.is_none_or(|f| f.matches(&vm.view.name, &vm.view.labels));
            // One that was announced anew is no other flow.
            if selected && !event.vm.is_empty() && !event.announced {
                take(recorded(vm, &event));
            }
        })
        .await
    }

    /// What people answered in a time, and what is in force, oldest first. Answers that a person took back are
    /// not among them. Of a filter: those for VMs that it selects.
    ///
    /// # Errors
    /// [`Refusal`] if the history cannot be read.
    pub async fn answered(&self, filter: Option<&VmSelector>, span: Span) -> Result<Vec<Grant>, Refusal> {
        let mut grants: BTreeMap<String, Grant> = BTreeMap::new();
        let mut read = |message: v1::Grant| {
            let stored = StoredGrant {
                grant: message,
                instances: Vec::new(),
                uses: Vec::new(),
            };
            if let Ok(grant) = convert::stored_grant(stored) {
                grants.insert(grant.id.0.clone(), grant);
            }
        };
        let mut revoked = Vec::new();
        let kinds = [v1::EventKind::GrantCreated, v1::EventKind::GrantEnded];
        self.each_event(&kinds, span, |event| match event.grant {
            Some(grant) => read(grant),
            // What ends by itself has no actor.
            None if !event.actor.is_empty() => revoked.push(event.subject),
            None => {}
        })
        .await?;
        for grant in self.grants("", "")? {
            read(grant);
        }
        for id in revoked {
            grants.remove(&id);
        }
        let labels_of =
            |name: &str| self.read(|state, _| state.fleet.vms.get(name).map(|vm| vm.view.labels.clone()));
        let reaches = |grant: &Grant| {
            let Some(filter) = filter else { return true };
            match (grant.vms.name(), filter.name()) {
                (Some(name), _) if !name.contains('*') => {
                    filter.matches(name, &labels_of(name).unwrap_or_default())
                }
                (_, Some(name)) => grant.vms.matches(name, &labels_of(name).unwrap_or_default()),
                _ => true,
            }
        };
        let mut grants: Vec<Grant> = grants.into_values().filter(reaches).collect();
        grants.sort_by(|a, b| a.created_at.cmp(&b.created_at).then_with(|| a.id.cmp(&b.id)));
        Ok(grants)
    }

    async fn each_event(
        &self,
        kinds: &[v1::EventKind],
        span: Span,
        mut take: impl FnMut(v1::Event),
    ) -> Result<(), Refusal> {
        self.bring_history_up_to_date();
        let mut query = EventQuery {
            kinds: kinds.iter().map(|kind| (*kind).into()).collect(),
            start: span.start,
            end: span.end,
            oldest_first: true,
            limit: CHUNK,
            ..Default::default()
        };
        loop {
            let chunk = self.writer().events(query.clone()).await.map_err(Refusal::from)?;
            let (full, last) = (
                chunk.len() == CHUNK,
                chunk.last().map_or(0, |event| event.sequence),
            );
            chunk.into_iter().for_each(&mut take);
            if !full {
                return Ok(());
            }
            query.after = last;
        }
    }

    fn asked(&self) -> Asked {
        self.read(|state, _| {
            let default = [
                IpNet::V4(ipnet::Ipv4Net::new_assert([192, 168, 127, 0].into(), 24)),
                IpNet::V6(ipnet::Ipv6Net::new_assert(
                    [0xfd00, 0, 0, 0, 0, 0, 0, 0].into(),
                    64,
                )),
            ];
            let alias = IpAddr::from([192, 168, 127, 254]);
            let there = state.fleet.dataplanes.values();
            let subnets = there.clone().flat_map(|d| d.subnets.iter().copied());
            let own = there.clone().flat_map(|d| d.guarded.host_addresses());
            let elsewhere = GuardedRanges::new(default.into_iter().chain(subnets), own).with_moved([alias]);
            Asked {
                vms: HashMap::new(),
                dataplanes: state
                    .fleet
                    .dataplanes
                    .iter()
                    .map(|(number, d)| (*number, Arc::new(d.guarded.clone())))
                    .collect(),
                elsewhere: Arc::new(elsewhere),
            }
        })
    }

    fn recorded_vm(&self, asked: &mut Asked, name: &str) -> Arc<RecordedVm> {
        if let Some(known) = asked.vms.get(name) {
            return Arc::clone(known);
        }
        let (view, dataplane) = self.read(|state, _| match state.fleet.vms.get(name) {
            Some(vm) => (vm.view.clone(), Some(vm.dataplane)),
            None => {
                let set = state.set.get(name);
                let view = VmView {
                    name: name.to_owned(),
                    labels: set.map_or_else(BTreeMap::new, |set| Vm::merged_labels(&BTreeMap::new(), set)),
                    instance: VmInstance(String::new()),
                };
                (view, None)
            }
        });
        let guarded = dataplane.and_then(|number| asked.dataplanes.get(&number));
        let vm = Arc::new(RecordedVm {
            view,
            guarded: Arc::clone(guarded.unwrap_or(&asked.elsewhere)),
        });
        asked.vms.insert(name.to_owned(), Arc::clone(&vm));
        vm
    }
}

/// What an event is to a policy.
fn recorded(vm: Arc<RecordedVm>, event: &v1::Event) -> Recalled {
    let count = event.count.max(1);
    if event.ingress {
        return Err((LeftOut::Forward, count));
    }
    if event.tuple.is_none() && event.names.is_empty() {
        return Err((LeftOut::NotKeptApart, count));
    }
    let outcome = match event.action() {
        v1::Action::Allow => Some(Outcome::Allow),
        v1::Action::Deny => Some(Outcome::Deny),
        v1::Action::Drop => Some(Outcome::Drop),
        v1::Action::Ask => Some(Outcome::Ask),
        v1::Action::Unspecified => None,
    };
    let at = convert::time(event.time);
    let (Some(subject), Some(outcome), Some(at)) = (subject(event), outcome, at) else {
        return Err((LeftOut::Unreadable, count));
    };
    Ok(Recorded {
        vm,
        subject,
        peer: event.peer_vm.clone(),
        outcome,
        reason: event.reason.clone().map(Reason::from).unwrap_or_default(),
        count,
        at,
    })
}

fn subject(event: &v1::Event) -> Option<Subject> {
    let names = event.names.iter().map(|name| Name::from_canonical(name).ok());
    let names: Vec<Name> = names.collect::<Option<_>>()?;
    let Some(tuple) = &event.tuple else {
        return names
            .into_iter()
            .next()
            .map(|name| Subject::Lookup(LookupSubject::new(name, 1)));
    };
    let protocol = v1::Protocol::try_from(tuple.protocol).ok()?;
    let protocol = Protocol::try_from(protocol).ok()?;
    let end =
        |address: &str, port: u32| Some(SocketAddr::new(address.parse().ok()?, u16::try_from(port).ok()?));
    let peer = end(&tuple.address, tuple.port)?;
    let guards: GuardSet = event
        .guards
        .iter()
        .map(|guard| guard_of(*guard))
        .collect::<Option<_>>()?;
    Some(Subject::Flow(FlowSubject {
        key: FlowKey {
            protocol,
            guest: end(&tuple.guest_address, tuple.guest_port)?,
            peer,
        }
        .judged(),
        dialled: match event.dialled.as_str() {
            "" => peer.ip(),
            dialled => dialled.parse().ok()?,
        },
        names,
        guards,
        // Handles are a dataplane's own; what was on the other side is known by name.
        peer_vm: guards.contains(Guard::Guest).then_some(VmId(0)),
    }))
}

pub(super) fn guard_of(value: i32) -> Option<Guard> {
    Guard::ALL
        .into_iter()
        .find(|guard| i32::from(v1::Guard::from(*guard)) == value)
}

//! What each answer to a request would reach: its scopes, for this VM, for those that share a label, for all.
//!
//! Counted when somebody looks at a request, never when it is made or listed. What is pending and bound is
//! counted here, under the lock; flows of the past are read from the history afterwards, without it
//! ([`Offers::count_past`]).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use vnet_proto::model::{Budget, Name, Protocol, Subject, Target, VmSelector};
use vnet_proto::v1;

use super::decide::context;
use super::{Hub, State};
use crate::approval::{Asked, Request, Scope};
use crate::clock::Now;
use crate::convert;
use crate::grant::{Grant, GrantAction, GrantId, Lifetime, ReadyGrant};
use crate::policy::would_let_through;
use crate::refusal::Refusal;

/// Labels of the asking VM that are offered as a choice of VMs.
pub const LABELS_OFFERED_MAX: usize = 8;
/// Bindings that are looked at for one request.
pub const BINDINGS_COUNTED_MAX: usize = 131_072;
/// Flows of the history that are looked at for one request.
pub const PAST_FLOWS_MAX: usize = 10_000;

/// What the scopes of one open request would reach.
#[derive(Debug)]
pub struct Offers {
    selectors: Vec<VmSelector>,
    offers: Vec<Offer>,
    /// Which selectors select each VM that is known by its name.
    selected: HashMap<String, Selected>,
}

#[derive(Debug)]
struct Offer {
    scope: Scope,
    target: Target,
    ready: ReadyGrant,
    /// One for each selector.
    counts: Vec<Counts>,
    /// Names that it covers, and the selectors that select a VM that knows them.
    names: HashMap<Name, Selected>,
}

/// A bit for each selector. There are as many as labels that are offered, and two.
pub(super) type Selected = u16;
const _: () = assert!(LABELS_OFFERED_MAX + 2 <= Selected::BITS as usize);

#[derive(Debug, Default)]
pub(super) struct Counts {
    vms: u32,
    requests: u32,
    past: u64,
}

impl Hub {
    /// One request, open or lately answered; of one that is open, also what its scopes reach, but for the past.
    ///
    /// # Errors
    /// [`Refusal`] if none, or several, have ids that begin so.
    pub fn offers(&self, prefix: &str) -> Result<(v1::PendingRequest, Option<Offers>), Refusal> {
        self.read(|state, now| {
            let request = state.pending.find(now.steady, prefix)?;
            let offers = request.is_open().then(|| state.offers(now, request));
            Ok((convert::request(request), offers))
        })
    }
}

impl State {
    fn offers(&self, now: Now, request: &Request) -> Offers {
        let mut offers = Offers::new(now, request);
        for (name, vm) in &self.fleet.vms {
            let selected = offers.select(name, &vm.view.labels);
            offers.each(selected, |_| true, |counts| counts.vms += 1);
        }
        for other in self.pending.open() {
            let name = &other.vm.name;
            let place = self.fleet.vms.get(name);
            let place = place.and_then(|vm| Some((vm, self.fleet.dataplanes.get(&vm.dataplane)?)));
            let Some((vm, dataplane)) = place else { continue };
            let selected = offers.select(name, &vm.view.labels);
            let subject = match &other.asked {
                Asked::Miss(subject) => subject,
                Asked::Forward(forward) => {
                    let target = Target::Forward(*forward);
                    let covers = |ready: &ReadyGrant| ready.grant.target == target;
                    offers.each(selected, covers, |counts| counts.requests += 1);
                    continue;
                }
            };
            let peer = self.fleet.peer_of(vm.dataplane, subject);
            let context = context(vm, &dataplane.guarded, peer);
            offers.each(
                selected,
                |ready| would_let_through(&context, ready, subject),
                |counts| counts.requests += 1,
            );
        }
        let address = match request.subject() {
            Some(Subject::Flow(flow)) => Some(flow.key.peer.ip()),
            Some(Subject::Lookup(_)) | None => None,
        };
        let vms = self.fleet.vms.iter();
        let bindings = vms.flat_map(|(name, vm)| vm.bindings.iter().map(move |binding| (name, binding)));
        for (vm, (name, binding)) in bindings.take(BINDINGS_COUNTED_MAX) {
            if binding.expires_at <= now.steady {
                continue;
            }
            let bound = address.is_some_and(|address| binding.addresses.contains(&address));
            offers.count_name(vm, name, bound);
        }
        offers
    }
}

impl Offers {
    fn new(now: Now, request: &Request) -> Self {
        let labels = request.vm.labels.iter().take(LABELS_OFFERED_MAX);
        let by_label = labels
            .filter_map(|(key, value)| VmSelector::new(None, BTreeMap::from([(key.clone(), value.clone())])));
        let selectors: Vec<VmSelector> = std::iter::once(VmSelector::named(request.vm.name.clone()))
            .chain(by_label)
            .chain([VmSelector::all()])
            .collect();
        let offers = request.scopes().into_iter().filter_map(|scope| {
            let target = request.target_of(scope)?;
            let grant = Grant::new(
                GrantId(String::new()),
                GrantAction::Allow,
                target.clone(),
                VmSelector::all(),
                Lifetime::Forever,
                Budget::default(),
                String::new(),
                now.steady,
            );
            Some(Offer {
                scope,
                target,
                ready: ReadyGrant::new(Arc::new(grant)),
                counts: selectors.iter().map(|_| Counts::default()).collect(),
                names: HashMap::new(),
            })
        });
        Self {
            offers: offers.collect(),
            selectors,
            selected: HashMap::new(),
        }
    }

    /// Counts flows that are in the history.
    pub fn count_past(&mut self, events: &[v1::Event]) {
        // One that was announced anew is no other flow.
        for event in events.iter().filter(|event| !event.announced) {
            let Some((protocol, address, port)) = egress(event) else {
                continue;
            };
            let names: Vec<Name> = event.names.iter().filter_map(|n| n.parse().ok()).collect();
            let times = event.count.max(1);
            // What labels a VM had that is gone is not known.
            let selected = self.select(&event.vm, &BTreeMap::new());
            self.each(
                selected,
                |ready| ready.flows && ready.test.covers_flow(protocol, address, port, &names),
                |counts| counts.past = counts.past.saturating_add(times),
            );
        }
    }

    /// As the contract says it.
    pub fn into_messages(self) -> Vec<v1::ScopeOption> {
        let Self {
            selectors, offers, ..
        } = self;
        let option = |offer: Offer| v1::ScopeOption {
            scope: convert::scope(offer.scope).into(),
            target: Some((&offer.target).into()),
            reaches: selectors
                .iter()
                .zip(offer.counts)
                .enumerate()
                .map(|(at, (selector, counts))| {
                    let names = offer.names.values().filter(|by| has(**by, at)).count();
                    v1::ScopeReach {
                        vms: Some(selector.into()),
                        vm_count: counts.vms,
                        requests: counts.requests,
                        names: u32::try_from(names).unwrap_or(u32::MAX),
                        past_flows: counts.past,
                    }
                })
                .collect(),
        };
        offers.into_iter().map(option).collect()
    }

    /// Which selectors select a VM. The labels are those of a VM that is there; they are asked for once.
    fn select(&mut self, name: &str, labels: &BTreeMap<String, String>) -> Selected {
        if let Some(known) = self.selected.get(name) {
            return *known;
        }
        let fitting = self
            .selectors
            .iter()
            .enumerate()
            .filter(|(_, s)| s.matches(name, labels));
        let selected = fitting.fold(0, |bits, (at, _)| bits | 1 << at);
        self.selected.insert(name.to_owned(), selected);
        selected
    }

    /// Counts something of a VM for each offer that covers it, under every selector that selects that VM. What
    /// an offer covers has nothing to do with selectors, and is asked once.
    pub(super) fn each(
        &mut self,
        selected: Selected,
        mut covers: impl FnMut(&ReadyGrant) -> bool,
        mut count: impl FnMut(&mut Counts),
    ) {
        for offer in self.offers.iter_mut().filter(|_| selected != 0) {
            if !covers(&offer.ready) {
                continue;
            }
            for (at, counts) in offer.counts.iter_mut().enumerate() {
                if has(selected, at) {
                    count(counts);
                }
            }
        }
    }

    fn count_name(&mut self, vm: &str, name: &Name, bound: bool) {
        let selected = self.selected.get(vm).copied().unwrap_or_default();
        for offer in &mut self.offers {
            let covered = match &offer.target {
                Target::Name { pattern, .. } => pattern.matches(name),
                Target::Address { .. } => bound,
                Target::Forward(_) => false,
            };
            if !covered || selected == 0 {
                continue;
            }
            match offer.names.get_mut(name) {
                Some(by) => *by |= selected,
                None => {
                    offer.names.insert(name.clone(), selected);
                }
            }
        }
    }
}

fn has(selected: Selected, at: usize) -> bool {
    selected & 1 << at != 0
}

/// What a guest's flow was for; none of one that came through a forward.
fn egress(event: &v1::Event) -> Option<(Protocol, IpAddr, u16)> {
    let tuple = event.tuple.as_ref()?;
    if event
        .reason
        .as_ref()
        .is_some_and(|reason| reason.step == "forward")
    {
        return None;
    }
    let protocol = Protocol::try_from(tuple.protocol()).ok()?;
    let port = u16::try_from(tuple.port).ok()?;
    Some((protocol, tuple.address.parse().ok()?, port))
}

//! What dataplanes have cached, decided anew: every difference is an error of vnet's.
//!
//! A cached verdict answers for all of its match, so that points drawn inside it are put to the full decision.
//! The points come of a seed: what was found once is found again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use vnet_proto::model::{
    Epoch, FlowKey, FlowMatch, FlowSubject, Guard, GuardSet, LookupMatch, LookupSubject, Malformed, Match,
    Name, Subject, VmId, VmSelector,
};
use vnet_proto::v1;
use vnet_proto::v1::command::Command;

use super::decide::decide_for;
use super::history::guard_of;
use super::{Hub, State};
use crate::convert;
use crate::fleet::DataplaneNo;
use crate::policy::Outcome;
use crate::refusal::Refusal;

/// Points drawn in a match where the client does not say, and at most.
const POINTS_DEFAULT: u32 = 8;
const POINTS_MAX: u32 = 1_000;
/// Differences that are told.
pub(super) const MISMATCHES_MAX: usize = 1_000;
/// Points decided before others have their turn.
const POINTS_AT_ONCE: usize = 1_024;
/// How long a dataplane may take to say what it has cached.
const REPORT_WAIT: Duration = Duration::from_secs(10);

/// A cached verdict, read and checked.
#[derive(Debug, Clone)]
struct Cached {
    outcome: Outcome,
    found: Match,
    epoch: Epoch,
    would_deny: bool,
    guards: GuardSet,
    peer: Option<VmId>,
    names: Vec<Name>,
}

/// xorshift64*.
#[derive(Debug)]
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

impl Hub {
    /// Decides anew what the caches of these VMs hold.
    ///
    /// # Errors
    /// [`Refusal`] if there is no such VM, or no randomness where no seed is given.
    pub async fn verify_verdicts(
        &self,
        filter: Option<&VmSelector>,
        seed: u64,
        points: u32,
    ) -> Result<v1::VerifyVerdictsResponse, Refusal> {
        let seed = match seed {
            0 => getrandom::u64().map_err(|e| Refusal::Unavailable(format!("no randomness: {e}")))? | 1,
            seed => seed,
        };
        let points = match points {
            0 => POINTS_DEFAULT,
            points => points.min(POINTS_MAX),
        };
        let vms = self.read(|state, _| state.attached(filter));
        if vms.is_empty() {
            return Err(Refusal::NotFound(
                "no VM is attached that this selects; list them with: vnetctl vm list".to_owned(),
            ));
        }
        let mut draw = Draw(seed);
        let mut answer = v1::VerifyVerdictsResponse {
            seed,
            ..Default::default()
        };
        for (name, number, handle) in vms {
            let Some(ack) = self.ask_for_verdicts(number, handle).await else {
                answer.vms_silent.push(name);
                continue;
            };
            answer.vms += 1;
            answer.left_out += ack.verdicts_in_all.saturating_sub(ack.verdicts.len() as u64);
            let mut at_once = 0;
            let mut waiting = Vec::new();
            for message in ack.verdicts {
                let Ok(cached) = Cached::try_from(message) else {
                    self.metrics.malformed.add(1);
                    answer.left_out += 1;
                    continue;
                };
                let drawn = cached.draw(&mut draw, points);
                at_once += drawn.len();
                waiting.push((cached, drawn));
                if at_once >= POINTS_AT_ONCE {
                    let batch = std::mem::take(&mut waiting);
                    self.read(|state, _| state.verify(&name, number, &batch, &mut answer));
                    at_once = 0;
                    // Between two batches others have their turn.
                    tokio::task::yield_now().await;
                }
            }
            self.read(|state, _| state.verify(&name, number, &waiting, &mut answer));
        }
        Ok(answer)
    }

    async fn ask_for_verdicts(&self, number: DataplaneNo, handle: VmId) -> Option<v1::Ack> {
        let command = Command::ReportVerdicts(v1::ReportVerdicts { vm: handle.0 });
        let wait = self
            .read(|state, _| state.send_command(number, None, |_| command))
            .ok()?;
        tokio::time::timeout(REPORT_WAIT, wait).await.ok()?.ok()?.ok()
    }
}

impl State {
    fn attached(&self, filter: Option<&VmSelector>) -> Vec<(String, DataplaneNo, VmId)> {
        let selected = self.fleet.vms.values().filter(|vm| !vm.lost);
        let selected = selected.filter(|vm| filter.is_none_or(|f| f.matches(&vm.view.name, &vm.view.labels)));
        selected
            .map(|vm| (vm.view.name.clone(), vm.dataplane, vm.handle))
            .collect()
    }

    fn verify(
        &mut self,
        name: &str,
        number: DataplaneNo,
        batch: &[(Cached, Vec<Subject>)],
        answer: &mut v1::VerifyVerdictsResponse,
    ) {
        self.refresh_grants(name);
        for (cached, points) in batch {
            let (Some(vm), Some(dataplane)) = (self.fleet.vms.get(name), self.fleet.dataplanes.get(&number))
            else {
                answer.outdated += 1;
                continue;
            };
            // What a change voided meanwhile is no longer what the cache answers by.
            if vm.dataplane != number || !cached.epoch.stands_under(dataplane.epoch) {
                answer.outdated += 1;
                continue;
            }
            answer.verdicts += 1;
            for point in points {
                let mut point = point.clone();
                if let (Subject::Flow(flow), Match::Flow(found)) = (&mut point, &cached.found) {
                    let (address, bound) = (flow.key.peer.ip(), !flow.names.is_empty());
                    let guarded = &dataplane.guarded;
                    let (guards, stands_alone) = match dataplane.nat.get(&address) {
                        Some(dialled) => {
                            flow.dialled = *dialled;
                            (guarded.guards_of_moved(address, *dialled, bound), true)
                        }
                        None => (guarded.guards_of(address, bound), false),
                    };
                    // A flow that stands otherwise is a miss, whatever the match says.
                    if flow.guards.is_empty() && !guards.is_empty() || stands_alone && !found.is_one_address()
                    {
                        continue;
                    }
                }
                answer.points += 1;
                let peer = cached.peer.and_then(|handle| self.fleet.vm_of(number, handle));
                let decision = decide_for(vm, &dataplane.guarded, peer, &point);
                if (decision.outcome, decision.would_deny) == (cached.outcome, cached.would_deny) {
                    continue;
                }
                answer.mismatches_in_all += 1;
                tracing::error!(
                    vm = name, found = %cached.found, point = %Said(&point), cached = ?cached.outcome,
                    decided = ?decision.outcome, reason = %decision.reason, "a cached verdict is not what is decided"
                );
                if answer.mismatches.len() < MISMATCHES_MAX {
                    answer.mismatches.push(v1::VerdictMismatch {
                        vm: name.to_owned(),
                        r#match: cached.found.to_string(),
                        point: Said(&point).to_string(),
                        cached: convert::action(cached.outcome).into(),
                        decided: convert::action(decision.outcome).into(),
                        reason: Some((&decision.reason).into()),
                        cached_would_deny: cached.would_deny,
                        decided_would_deny: decision.would_deny,
                    });
                }
            }
        }
    }
}

/// A point as text.
struct Said<'a>(&'a Subject);

impl std::fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Subject::Flow(flow) => flow.key.fmt(f),
            Subject::Lookup(lookup) if lookup.alias => write!(f, "alias {}", lookup.name),
            Subject::Lookup(lookup) => write!(f, "lookup {}", lookup.name),
        }
    }
}

impl TryFrom<v1::CachedVerdict> for Cached {
    type Error = Malformed;

    fn try_from(message: v1::CachedVerdict) -> Result<Self, Malformed> {
        let wrong = |field, value| Malformed::Enum { field, value };
        let outcome = match v1::Action::try_from(message.action) {
            Ok(v1::Action::Allow) => Outcome::Allow,
            Ok(v1::Action::Deny) => Outcome::Deny,
            Ok(v1::Action::Drop) => Outcome::Drop,
            _ => return Err(wrong("cached.action", message.action)),
        };
        let guards = message
            .guards
            .iter()
            .map(|guard| guard_of(*guard).ok_or(wrong("cached.guards", *guard)));
        let guards: GuardSet = guards.collect::<Result<_, _>>()?;
        let name = |text: &String| {
            Name::from_canonical(text).map_err(|source| Malformed::Name {
                field: "cached.names",
                source,
            })
        };
        Ok(Self {
            outcome,
            found: match message.r#match.ok_or(Malformed::Missing {
                field: "cached.match",
            })? {
                v1::cached_verdict::Match::Flow(flow) => Match::Flow(flow.try_into()?),
                v1::cached_verdict::Match::Lookup(names) => Match::of_names(&names)?,
            },
            epoch: message
                .epoch
                .ok_or(Malformed::Missing {
                    field: "cached.epoch",
                })?
                .try_into()?,
            would_deny: message.would_deny,
            guards,
            peer: guards.contains(Guard::Guest).then_some(VmId(message.peer)),
            names: message.names.iter().map(name).collect::<Result<_, _>>()?,
        })
    }
}

impl Cached {
    /// Both ends of the match, and points between them.
    fn draw(&self, draw: &mut Draw, points: u32) -> Vec<Subject> {
        match &self.found {
            Match::Flow(found) => self.draw_flows(found, draw, points),
            Match::Lookup(found) | Match::Alias(found) => {
                let alias = matches!(self.found, Match::Alias(_));
                let subject = |name: Name| {
                    Subject::Lookup(LookupSubject {
                        name,
                        query_type: 1,
                        alias,
                    })
                };
                let below = |draw: &mut Draw, parent: Option<&Name>| {
                    let label = format!("v{:x}", draw.next() & 0xff_ffff);
                    let text = match parent {
                        Some(parent) => format!("{label}.{parent}"),
                        None => format!(
                            "{label}.{}",
                            ["com", "test", "example.org", "co.uk"][(draw.next() >> 62) as usize]
                        ),
                    };
                    Name::from_canonical(&text).ok()
                };
                match found {
                    LookupMatch::Exact(name) => vec![subject(name.clone())],
                    LookupMatch::Subdomains(name) => (0..=points)
                        .filter_map(|_| below(draw, Some(name)))
                        .map(subject)
                        .collect(),
                    LookupMatch::Any => (0..=points)
                        .filter_map(|_| below(draw, None))
                        .map(subject)
                        .collect(),
                }
            }
        }
    }

    fn draw_flows(&self, found: &FlowMatch, draw: &mut Draw, points: u32) -> Vec<Subject> {
        let ends = [
            (found.prefix.network(), found.ports.first()),
            (found.prefix.broadcast(), found.ports.last()),
        ];
        let between = (0..points).map(|_| {
            let span = u64::from(found.ports.last() - found.ports.first()) + 1;
            // Less than the span, which fits a port.
            let offset = u16::try_from((draw.next() >> 16) % span).unwrap_or(0);
            (address_inside(draw, found.prefix), found.ports.first() + offset)
        });
        let between: Vec<(IpAddr, u16)> = between.collect();
        let mut all: Vec<(IpAddr, u16)> = ends.into_iter().chain(between).collect();
        all.sort_unstable();
        all.dedup();
        let flow = |(address, port): (IpAddr, u16)| {
            let guest = match address {
                IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
                IpAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
            };
            Subject::Flow(FlowSubject {
                key: FlowKey {
                    protocol: found.protocol,
                    guest: SocketAddr::new(guest, 0),
                    peer: SocketAddr::new(address, port),
                },
                dialled: address,
                names: self.names.clone(),
                guards: self.guards,
                peer_vm: self.peer,
            })
        };
        all.into_iter().map(flow).collect()
    }
}

fn address_inside(draw: &mut Draw, prefix: IpNet) -> IpAddr {
    match prefix {
        IpNet::V4(net) => {
            let bits = net.hostmask().to_bits() & (draw.next() >> 32) as u32;
            IpAddr::from(Ipv4Addr::from_bits(net.network().to_bits() | bits))
        }
        IpNet::V6(net) => {
            let random = u128::from(draw.next()) << 64 | u128::from(draw.next());
            let bits = net.hostmask().to_bits() & random;
            IpAddr::from(Ipv6Addr::from_bits(net.network().to_bits() | bits))
        }
    }
}

//! What dataplanes report of flows, lookups and bindings.

use std::sync::Arc;
use std::time::SystemTime;

use vnet_proto::model::{
    FlowId, FlowSubject, Malformed, MissId, Name, Reason, Subject, VmId, VmSelector, address_from_bytes,
    names_from_wire,
};
use vnet_proto::v1;

use super::events::{about, of_peer, on_subject};
use super::repeats::Key;
use super::{Hub, State, Ticket, Which, ids};
use crate::approval::MissRef;
use crate::clock::Now;
use crate::convert;
use crate::fleet::{Binding, DataplaneNo, FLOWS_PER_DATAPLANE_MAX, LiveFlow};
use crate::grant::ID_PREFIX_MIN;
use crate::policy::Outcome;
use crate::refusal::Refusal;
use crate::watch::Watch;

/// Characters taken of what a dataplane calls a limit, and of what it was reached for.
const LIMIT_CHARS_MAX: usize = 1_024;

impl Hub {
    /// The live flows of these VMs, newest first, each with the number that it is sorted by.
    pub fn flows(&self, which: Which<'_>) -> Vec<(u64, v1::Flow)> {
        self.read(|state, _| {
            let mut flows: Vec<&LiveFlow> = state.live_flows(which).collect();
            flows.sort_by_key(|flow| std::cmp::Reverse(flow.number));
            flows
                .into_iter()
                .map(|flow| (flow.number, convert::flow(flow)))
                .collect()
        })
    }

    /// Every live flow, then each change.
    ///
    /// # Errors
    /// [`Refusal::Limit`] if too many watch.
    pub fn watch_flows(&self, filter: Option<VmSelector>) -> Result<Watch<v1::WatchFlowsResponse>, Refusal> {
        self.read(|state, _| {
            let response = |change: v1::FlowChange, flow| v1::WatchFlowsResponse {
                change: change.into(),
                flow,
            };
            let which = Which {
                vms: filter.as_ref(),
                ..Default::default()
            };
            let mut first: Vec<_> = state
                .live_flows(which)
                .map(|flow| response(v1::FlowChange::Added, Some(convert::flow(flow))))
                .collect();
            first.push(response(v1::FlowChange::Synced, None));
            state.flow_watches.add(filter, first)
        })
    }

    /// Tells a flow's dataplane to close it.
    ///
    /// # Errors
    /// [`Refusal`] if no flow, or several, have ids that begin so.
    pub fn close_flow(&self, prefix: &str, actor: &str) -> Result<(v1::Flow, Ticket), Refusal> {
        self.read(|state, _| {
            if prefix.len() < ID_PREFIX_MIN {
                return Err(Refusal::field(
                    "id",
                    format!(
                        "{prefix:?} is too short for the beginning of a flow's id (expected at least \
                         {ID_PREFIX_MIN} characters); list them with: vnetctl flows list"
                    ),
                ));
            }
            let mut fitting: Vec<(DataplaneNo, FlowId, &LiveFlow)> = state
                .fleet
                .dataplanes
                .iter()
                .flat_map(|(number, d)| d.flows.iter().map(|(id, flow)| (*number, *id, flow)))
                .filter(|(_, _, flow)| flow.id.starts_with(prefix))
                .collect();
            let (Some((number, id, flow)), true) = (fitting.pop(), fitting.is_empty()) else {
                return Err(if fitting.is_empty() {
                    Refusal::NotFound(format!(
                        "no flow has an id that begins with {prefix:?}; list them with: vnetctl flows list"
                    ))
                } else {
                    let count = fitting.len() + 1;
                    Refusal::Ambiguous(format!(
                        "{count} flows have ids that begin with {prefix:?}; give more of the id"
                    ))
                });
            };
            let flow = convert::flow(flow);
            if state
                .fleet
                .dataplanes
                .get(&number)
                .is_none_or(|d| d.link.is_none())
            {
                return Err(Refusal::Unavailable(format!(
                    "the dataplane of flow {} is lost",
                    flow.id
                )));
            }
            let ticket = state.ticket();
            state.cut(Some(ticket.id()), number, vec![id], &format!("closed by {actor}"));
            state.finish_if_done(ticket.id());
            Ok((flow, ticket))
        })
    }
}

impl State {
    fn live_flows<'a>(&'a self, which: Which<'a>) -> impl Iterator<Item = &'a LiveFlow> {
        let all = which.vms.is_none() && which.network.is_empty();
        let selected = move |flow: &&LiveFlow| {
            let vm = self.fleet.vms.get(&flow.vm);
            all || vm.is_some_and(|vm| which.has(&self.fleet, &vm.view.name, &vm.view.labels))
        };
        self.fleet
            .dataplanes
            .values()
            .flat_map(|d| d.flows.values())
            .filter(selected)
    }

    /// A flow opened, or was announced as live with its dataplane's session. One that an older epoch's verdict let
    /// through is judged anew, and cut if need be.
    pub(super) fn handle_flow_opened(
        &mut self,
        now: Now,
        number: DataplaneNo,
        message: v1::FlowOpened,
        announced: bool,
    ) -> Result<(), Malformed> {
        let id = FlowId(message.flow_id);
        let subject: FlowSubject = message
            .subject
            .ok_or(Malformed::Missing {
                field: "flow_opened.subject",
            })?
            .try_into()?;
        let names = names_from_wire("flow_opened.names", &message.names)?;
        let dataplane = self.fleet.dataplanes.get(&number);
        let name = dataplane.and_then(|d| d.vms.get(&VmId(message.vm))).cloned();
        let (Some(dataplane), Some(name)) = (dataplane, name) else {
            self.metrics.stray.add(1);
            self.cut(None, number, vec![id], "its VM is not known");
            return Ok(());
        };
        let epoch = message
            .epoch
            .map(vnet_proto::model::Epoch::try_from)
            .transpose()?;
        let stands = message.ingress || epoch.is_some_and(|e| e.stands_under(dataplane.epoch));
        if dataplane.flows.len() >= FLOWS_PER_DATAPLANE_MAX && !dataplane.flows.contains_key(&id) {
            self.metrics.limits_reached.add(1);
            self.cut(None, number, vec![id], "the limit of live flows is reached");
            let text = format!("{FLOWS_PER_DATAPLANE_MAX} flows are live, which is the limit");
            let key = Key::limit(&text);
            self.repeated_event(now, key, 1, about(v1::EventKind::LimitReached, &name, text));
            return Ok(());
        }
        self.last_flow += 1;
        let flow = LiveFlow {
            id: ids::counted(self.last_flow),
            number: self.last_flow,
            vm: name.clone(),
            ingress: message.ingress,
            once: self.is_spent(&message.grant_id),
            peer: subject
                .peer_vm
                .and_then(|handle| self.fleet.vm_of(number, handle))
                .map(|peer| peer.view.name.clone())
                .unwrap_or_default(),
            subject,
            names,
            grant: message.grant_id,
            reason: message.reason.map(Reason::from).unwrap_or_default(),
            would_deny: message.would_deny,
            opened_at: convert::time(message.opened_at).unwrap_or(now.wall),
            bytes_up: message.bytes_up,
            bytes_down: message.bytes_down,
        };
        if message.miss_id == 0 && !flow.grant.is_empty() {
            self.count_cached_use(now, &flow.grant.clone());
        }
        self.refresh_grants(&name);
        // What a verdict in force let through is allowed; a forward's flow never had one.
        let allowed = (stands && !flow.ingress) || self.is_allowed(number, &flow);
        // It was counted before it was told.
        self.release(MissRef {
            dataplane: number,
            miss: MissId(message.miss_id),
        });
        let subject = Subject::Flow(flow.subject.clone());
        let done = if announced { "still has open" } else { "opened" };
        let text = format!("{name} {done} {}{}", flow.subject.key, of_peer(&flow.peer));
        let event = v1::Event {
            subject: flow.id.clone(),
            action: v1::Action::Allow.into(),
            reason: Some((&flow.reason).into()),
            would_deny: flow.would_deny,
            ingress: flow.ingress,
            announced,
            ..on_subject(
                about(v1::EventKind::FlowOpened, &name, text),
                &subject,
                &flow.peer,
            )
        };
        self.event(now, event);
        self.publish_flow(v1::FlowChange::Added, &flow, "");
        self.budgets.add(&flow);
        let replaced = self
            .fleet
            .dataplanes
            .get_mut(&number)
            .and_then(|d| d.flows.insert(id, flow));
        if let Some(replaced) = &replaced {
            self.budgets.remove(replaced);
        }
        if let Some(vm) = self.fleet.vms.get_mut(&name) {
            vm.live_flows += u64::from(replaced.is_none());
        }
        if !allowed {
            let change = self.open_change_of(number);
            self.cut(change, number, vec![id], "no longer allowed");
        }
        Ok(())
    }

    pub(super) fn handle_flow_closed(&mut self, now: Now, number: DataplaneNo, message: v1::FlowClosed) {
        let id = FlowId(message.flow_id);
        let Some(flow) = self
            .fleet
            .dataplanes
            .get_mut(&number)
            .and_then(|d| d.flows.remove(&id))
        else {
            self.metrics.stray.add(1);
            return;
        };
        let end = v1::FlowEnd::try_from(message.end).unwrap_or_default();
        let flow = LiveFlow {
            bytes_up: message.bytes_up,
            bytes_down: message.bytes_down,
            ..flow
        };
        self.flow_ended(now, flow, end, message.refusal);
    }

    /// A flow is gone from its dataplane's table. `refusal` says why, of one that was refused for its name.
    pub(super) fn flow_ended(
        &mut self,
        now: Now,
        flow: LiveFlow,
        end: v1::FlowEnd,
        refusal: Option<v1::NameRefusal>,
    ) {
        self.budgets.remove(&flow);
        if let Some(vm) = self.fleet.vms.get_mut(&flow.vm) {
            vm.live_flows = vm.live_flows.saturating_sub(1);
        }
        let how = match end {
            v1::FlowEnd::Unspecified => "ended",
            v1::FlowEnd::Finished => "finished",
            v1::FlowEnd::GuestReset => "was reset by the guest",
            v1::FlowEnd::HostReset => "was reset by the other side",
            v1::FlowEnd::Idle => "was idle too long",
            v1::FlowEnd::Cut => "was cut",
            v1::FlowEnd::VmDown => "ended with its VM",
            v1::FlowEnd::Evicted => "was evicted at a limit",
            v1::FlowEnd::GrantEnded => "ended with its grant",
            v1::FlowEnd::Unreachable => "could not reach its destination",
            v1::FlowEnd::NameRefused => "was refused for its name",
        };
        self.publish_flow(v1::FlowChange::Removed, &flow, how);
        if let Some(refusal) = refusal.filter(|_| end == v1::FlowEnd::NameRefused) {
            self.name_refused(now, &flow, refusal);
        }
        let duration = now.wall.duration_since(flow.opened_at).unwrap_or_default();
        tracing::info!(
            target: "flow",
            vm = flow.vm, flow = flow.id, to = %flow.subject.key, up = flow.bytes_up, down = flow.bytes_down,
            ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX), end = how, reason = %flow.reason,
            "flow ended"
        );
        let text = format!("{}{} of {} {how}", flow.subject.key, of_peer(&flow.peer), flow.vm);
        let subject = Subject::Flow(flow.subject);
        let event = v1::Event {
            subject: flow.id,
            reason: Some((&flow.reason).into()),
            bytes_up: flow.bytes_up,
            bytes_down: flow.bytes_down,
            would_deny: flow.would_deny,
            ingress: flow.ingress,
            ..on_subject(
                about(v1::EventKind::FlowClosed, &flow.vm, text),
                &subject,
                &flow.peer,
            )
        };
        self.event(now, event);
    }

    /// A flow was let through by a name and did not speak it: told as a denial, with both names.
    fn name_refused(&mut self, now: Now, flow: &LiveFlow, refusal: v1::NameRefusal) {
        self.metrics.names_refused.add(1);
        let spoken = refusal.spoken.parse::<Name>().ok();
        let wanted: Vec<Name> = refusal
            .wanted
            .iter()
            .take(WANTED_MAX)
            .filter_map(|name| Name::from_canonical(name).ok())
            .collect();
        let why: String = refusal.text.chars().take(REFUSAL_CHARS_MAX).collect();
        let word: String = refusal.word.chars().take(REFUSAL_WORD_CHARS_MAX).collect();
        let mut text = format!("{}{}: {why}", flow.subject.key, of_peer(&flow.peer));
        for (place, name) in wanted.iter().enumerate() {
            text.push_str(if place == 0 { "; it rests on " } else { ", " });
            text.push_str(&name.to_string());
        }
        tracing::debug!(target: "flow", vm = flow.vm, flow = flow.id, reason = text, "refused for its name");
        let reason = Reason::new("name", word, text.clone());
        let subject = Subject::Flow(flow.subject.clone());
        let event = v1::Event {
            action: v1::Action::Deny.into(),
            reason: Some((&reason).into()),
            spoken_name: spoken.map(|name| name.to_string()).unwrap_or_default(),
            ..on_subject(
                about(v1::EventKind::FlowDenied, &flow.vm, text),
                &subject,
                &flow.peer,
            )
        };
        let key = Key::decided(v1::EventKind::FlowDenied, &subject, &reason, false);
        self.repeated_event(now, key, 1, event);
    }

    pub(super) fn handle_flow_stats(
        &mut self,
        now: Now,
        number: DataplaneNo,
        stats: v1::FlowStats,
    ) -> Result<(), Malformed> {
        for count in stats.counts {
            let flows = self.fleet.dataplanes.get_mut(&number).map(|d| &mut d.flows);
            let Some(flow) = flows.and_then(|f| f.get_mut(&FlowId(count.flow_id))) else {
                // It may have ended while the counts were on their way.
                continue;
            };
            flow.bytes_up = count.bytes_up;
            flow.bytes_down = count.bytes_down;
            if !self.flow_watches.is_empty() {
                let flow = flow.clone();
                self.publish_flow(v1::FlowChange::Updated, &flow, "");
            }
        }
        self.handle_uses(now, number, stats.uses)
    }

    /// The dataplane's cache answered.
    pub(super) fn handle_decided(
        &mut self,
        now: Now,
        number: DataplaneNo,
        message: v1::Decided,
    ) -> Result<(), Malformed> {
        let subject = match message.subject.ok_or(Malformed::Missing {
            field: "decided.subject",
        })? {
            v1::decided::Subject::Flow(flow) => Subject::Flow(flow.try_into()?),
            v1::decided::Subject::Lookup(lookup) => Subject::Lookup(lookup.try_into()?),
        };
        let outcome = match v1::Action::try_from(message.action) {
            Ok(v1::Action::Allow) => Outcome::Allow,
            Ok(v1::Action::Deny) => Outcome::Deny,
            Ok(v1::Action::Drop) => Outcome::Drop,
            _ => {
                return Err(Malformed::Enum {
                    field: "decided.action",
                    value: message.action,
                });
            }
        };
        let name = self
            .fleet
            .dataplanes
            .get(&number)
            .and_then(|d| d.vms.get(&VmId(message.vm)))
            .cloned();
        let Some(name) = name else {
            self.metrics.stray.add(1);
            return Ok(());
        };
        let reason = message.reason.map(Reason::from).unwrap_or_default();
        let count = message.count.max(1);
        self.decided(
            now,
            &name,
            &subject,
            outcome,
            &reason,
            count,
            message.would_deny,
            true,
        );
        Ok(())
    }

    pub(super) fn handle_binding(
        &mut self,
        now: Now,
        number: DataplaneNo,
        message: v1::BindingLearned,
    ) -> Result<(), Malformed> {
        let name = Name::from_canonical(&message.name).map_err(|source| Malformed::Name {
            field: "binding.name",
            source,
        })?;
        let addresses = message
            .addresses
            .iter()
            .map(|bytes| address_from_bytes("binding.addresses", bytes))
            .collect::<Result<Vec<_>, _>>()?;
        let expires_in = message.expires_in.ok_or(Malformed::Missing {
            field: "binding.expires_in",
        })?;
        let seconds = expires_in.seconds.unsigned_abs();
        let expires_in = std::time::Duration::try_from(expires_in).map_err(|_| Malformed::Range {
            field: "binding.expires_in",
            value: seconds,
        })?;
        let expires_at: SystemTime = now.steady.checked_add(expires_in).unwrap_or(now.steady);
        let vm = self
            .fleet
            .dataplanes
            .get(&number)
            .and_then(|d| d.vms.get(&VmId(message.vm)));
        match vm.cloned().and_then(|vm| self.fleet.vms.get_mut(&vm)) {
            Some(vm) => vm.bind(
                name,
                Binding {
                    addresses,
                    expires_at,
                },
            ),
            None => self.metrics.stray.add(1),
        }
        Ok(())
    }

    /// A limit that a policy sets refused lookups.
    pub(super) fn handle_limit_reached(&mut self, now: Now, number: DataplaneNo, message: &v1::LimitReached) {
        let dataplane = self.fleet.dataplanes.get(&number);
        let Some(name) = dataplane.and_then(|d| d.vms.get(&VmId(message.vm))).cloned() else {
            self.metrics.stray.add(1);
            return;
        };
        let shown = |text: &str| text.chars().take(LIMIT_CHARS_MAX).collect::<String>();
        let (limit, subject, value) = (shown(&message.limit), shown(&message.subject), message.value);
        let of = if subject.is_empty() {
            String::new()
        } else {
            format!(" for {subject}")
        };
        let text = format!("{limit} ({value}) is reached{of}: what is beyond it is refused");
        let key = Key::limit(&text);
        let event = v1::Event {
            reason: Some(v1::Reason {
                step: "limit".to_owned(),
                subject: limit,
                text: text.clone(),
            }),
            names: (!subject.is_empty()).then_some(subject).into_iter().collect(),
            action: v1::Action::Deny.into(),
            ..about(v1::EventKind::LimitReached, &name, text)
        };
        self.repeated_event(now, key, message.count.max(1), event);
    }

    /// Tells those who watch. `ended`: how, of one that is gone.
    pub(super) fn publish_flow(&mut self, change: v1::FlowChange, flow: &LiveFlow, ended: &str) {
        if self.flow_watches.is_empty() {
            return;
        }
        let response = Arc::new(v1::WatchFlowsResponse {
            change: change.into(),
            flow: Some(v1::Flow {
                ended: ended.to_owned(),
                ..convert::flow(flow)
            }),
        });
        let labels = self
            .fleet
            .vms
            .get(&flow.vm)
            .map(|vm| vm.view.labels.clone())
            .unwrap_or_default();
        self.flow_watches.publish(|filter| {
            let lets = filter.as_ref().is_none_or(|f| f.matches(&flow.vm, &labels));
            lets.then(|| Arc::clone(&response))
        });
    }
}

/// Names that are told of a refusal; a dataplane sends no more than are bound to one address.
const WANTED_MAX: usize = 16;
/// Characters of a refusal's sentence; one of a dataplane of this version is shorter.
const REFUSAL_CHARS_MAX: usize = 400;
/// Characters of a refusal's word.
const REFUSAL_WORD_CHARS_MAX: usize = 32;

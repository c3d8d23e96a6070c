//! What the controlplane decides: verdicts, how long a miss may wait, leases, budgets, and how a guest is treated.
//!
//! Nothing here is acknowledged. What is malformed decides nothing, and a miss ends at its deadline.

use std::time::{Duration, Instant};

use vnet_proto::model::{Epoch, Malformed, Match, MissId, Subject, Verdict, VmId};
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message;

use super::{Conversation, Link};
use crate::causes::WithCauses;
use crate::message::{Input, Order, Settings, vm_of_miss};
use crate::metrics::RefusedMessage;
use crate::session::wire;

impl Conversation {
    pub(super) fn verdict(&mut self, message: v1::Verdict, now: Instant) -> Result<(), String> {
        // Malformed, it decides nothing: the miss ends at its deadline.
        let verdict = Verdict::try_from(message).map_err(|error| WithCauses(&error).to_string())?;
        let miss = verdict.miss;
        if let Some(held) = self.mirror.held_miss(miss)
            && !covers(&verdict.found, &held.miss.subject)
        {
            return Err(format!(
                "a verdict for {} does not cover miss {miss}",
                verdict.found
            ));
        }
        if !self.epoch.is_some_and(|epoch| verdict.epoch.stands_under(epoch)) {
            self.metrics
                .messages_refused
                .of(RefusedMessage::StaleVerdict)
                .increment();
            self.ask_again(miss, now);
            return Ok(());
        }
        self.mirror.miss_ended(miss);
        if self
            .router
            .send(vm_of_miss(miss), Input::Order(Order::Verdict(Box::new(verdict))))
        {
            self.metrics.verdicts.increment();
        } else {
            self.metrics
                .messages_refused
                .of(RefusedMessage::NoSuchVm)
                .increment();
        }
        Ok(())
    }

    fn ask_again(&mut self, miss: MissId, now: Instant) {
        if let Some(held) = self.mirror.held_miss(miss) {
            let message = held.to_message(now, self.epoch);
            self.metrics.misses_reannounced.increment();
            self.outbox.push_back(Message::Miss(message));
        }
    }

    pub(super) fn held(&mut self, message: &v1::Held, now: Instant) -> Result<(), String> {
        let miss = MissId(message.miss_id);
        let hold =
            wire::positive("held.hold", message.hold, wire::HOLD_MAX).map_err(|error| error.to_string())?;
        self.mirror.held(miss, hold, now);
        if !self
            .router
            .send(vm_of_miss(miss), Input::Order(Order::Held { miss, hold }))
        {
            self.metrics
                .messages_refused
                .of(RefusedMessage::NoSuchVm)
                .increment();
        }
        Ok(())
    }

    pub(super) fn heartbeat(&mut self, message: v1::Heartbeat) -> Result<(), String> {
        let heard = wire::required("heartbeat.epoch", message.epoch)
            .and_then(Epoch::try_from)
            .map_err(|error| error.to_string())?;
        let Link::Open { lease, .. } = self.link else {
            return Ok(());
        };
        if self.epoch == Some(heard) {
            self.router.broadcast(&Order::Lease { epoch: heard, lease });
        } else {
            // Of an epoch whose Revoke is still to come, or of an old one: neither may prolong anything.
            self.metrics
                .messages_refused
                .of(RefusedMessage::StaleHeartbeat)
                .increment();
        }
        Ok(())
    }

    pub(super) fn budget_limit(&mut self, message: v1::BudgetLimit) -> Result<(), String> {
        let (vm, grant) = (VmId(message.vm), message.grant_id);
        let limit = match (message.limit, message.ended) {
            (None, true) => {
                self.mirror.grant_ended(vm, &grant);
                None
            }
            (Some(limit), false) => Some(limit.into()),
            _ => return Err("a budget_limit has either a limit or an end".to_owned()),
        };
        // A guest that is gone uses nothing more.
        self.router.send(vm, Input::Order(Order::Limit { grant, limit }));
        Ok(())
    }

    pub(super) fn settings(&mut self, message: v1::VmSettings) -> Result<(), Malformed> {
        let vm = VmId(message.vm);
        let lookup_hold = match message.lookup_hold {
            None => self.mirror.resolver_patience(vm).unwrap_or(RESOLVER_PATIENCE),
            given => wire::positive("vm_settings.lookup_hold", given, wire::HOLD_MAX)?,
        };
        let loss_grace = match message.loss_grace {
            None => Duration::ZERO,
            given => wire::positive("vm_settings.loss_grace", given, wire::LOSS_GRACE_MAX)?,
        };
        let dns = message
            .dns
            .map(wire::dns_settings)
            .transpose()?
            .unwrap_or_default();
        self.mirror.named(vm, &message.name);
        let settings = Settings {
            name: message.name,
            switch_open: message.switch_open,
            forwards_closed: message.forwards_closed,
            synthetic_answers: message.synthetic_answers,
            lookup_hold,
            hold: self.hold,
            dns,
            loss_grace,
            deny_ech: !message.ech_outer,
            deny_quic: message.quic_denied,
            judges_aliases: self.judges_aliases,
        };
        if !self.router.send(vm, Input::Order(Order::Settings(settings))) {
            self.metrics
                .messages_refused
                .of(RefusedMessage::NoSuchVm)
                .increment();
        }
        Ok(())
    }
}

fn covers(found: &Match, subject: &Subject) -> bool {
    match (found, subject) {
        (Match::Flow(found), Subject::Flow(flow)) => found.matches(&flow.key),
        (found, Subject::Lookup(lookup)) => found.matches_lookup(lookup),
        (Match::Lookup(_) | Match::Alias(_), Subject::Flow(_)) => false,
    }
}

/// How long a VM's resolver waits where nobody says.
const RESOLVER_PATIENCE: Duration = Duration::from_secs(4);

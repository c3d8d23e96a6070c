//! `EventService`: watches and lists events.

use std::sync::Arc;

use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use tonic::{Request, Response, Status};
use vnet_proto::v1;
use vnet_proto::v1::event_service_server::EventService;

use super::{Api, Changes, PAGE_DEFAULT, PAGE_MAX, not_a_token, selector, stream};
use crate::convert;
use crate::hub::{EventFilter, Hub};
use crate::refusal::Refusal;
use crate::store::EventQuery;

/// Events read from the history at once.
const CHUNK: usize = 1_000;

#[tonic::async_trait]
impl EventService for Api {
    type WatchEventsStream = Changes<v1::WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let request = request.into_inner();
        let filter = EventFilter {
            vms: selector(request.vms)?,
            kinds: kinds(request.kinds)?,
            network: request.network,
        };
        // The watch first: what happens while the history is read waits in its queue.
        let (watch, last) = self.hub.watch_events(filter.clone())?;
        let response = |event| v1::WatchEventsResponse { event: Some(event) };
        let live = stream(watch, gap).map_ok(response);
        let Some(after) = request.after_sequence else {
            return Ok(Response::new(Box::pin(live)));
        };
        if after > last {
            let text = format!(
                "event {after} has not happened yet (the last is {last}); watch without after_sequence"
            );
            return Err(Refusal::field("after_sequence", text).into());
        }
        let past = past(Arc::clone(&self.hub), filter, after, last).map_ok(response);
        Ok(Response::new(Box::pin(past.chain(live))))
    }

    async fn list_events(
        &self,
        request: Request<v1::ListEventsRequest>,
    ) -> Result<Response<v1::ListEventsResponse>, Status> {
        let request = request.into_inner();
        let filter = EventFilter {
            vms: selector(request.vms)?,
            kinds: kinds(request.kinds)?,
            network: request.network,
        };
        if request.page_token.is_empty() {
            self.hub.bring_history_up_to_date();
        }
        let size = match request.page_size as usize {
            0 => PAGE_DEFAULT,
            size => size.min(PAGE_MAX),
        };
        let time = request.time.unwrap_or_default();
        let mut query = EventQuery {
            kinds: filter.kinds.clone(),
            start: convert::time(time.start),
            end: convert::time(time.end),
            limit: CHUNK,
            ..Default::default()
        };
        if !request.page_token.is_empty() {
            query.before = request.page_token.parse().map_err(|_| not_a_token())?;
        }
        let mut events: Vec<v1::Event> = Vec::new();
        loop {
            let chunk = self
                .hub
                .writer()
                .events(query.clone())
                .await
                .map_err(Refusal::from)?;
            let (full, oldest) = (chunk.len() == CHUNK, chunk.last().map_or(0, |e| e.sequence));
            events.extend(self.hub.filter_events(&filter, chunk));
            if !full || events.len() > size {
                break;
            }
            query.before = oldest;
        }
        let more = events.len() > size;
        events.truncate(size);
        let next_page_token = match events.last() {
            Some(last) if more => last.sequence.to_string(),
            _ => String::new(),
        };
        Ok(Response::new(v1::ListEventsResponse {
            events,
            next_page_token,
        }))
    }
}

/// Recorded events after one sequence number and up to another, oldest first; what is no longer kept
/// is a gap.
fn past(
    hub: Arc<Hub>,
    filter: EventFilter,
    after: u64,
    last: u64,
) -> impl Stream<Item = Result<v1::Event, Status>> + Send {
    let chunks = futures_util::stream::try_unfold(after, move |after| {
        let (hub, filter) = (Arc::clone(&hub), filter.clone());
        async move {
            if after >= last {
                return Ok(None);
            }
            let query = EventQuery {
                after,
                before: last + 1,
                oldest_first: true,
                limit: CHUNK,
                ..Default::default()
            };
            let chunk = hub.writer().events(query).await.map_err(Refusal::from)?;
            let reached = chunk.last().map_or(last, |e| e.sequence);
            let mut events = Vec::with_capacity(chunk.len());
            let mut expected = after + 1;
            for event in chunk {
                // Nobody knows how many were lost where a history was cut off; that event says so itself.
                if event.sequence > expected && event.kind() != v1::EventKind::HistoryCutOff {
                    events.push(gap(event.sequence - expected));
                }
                expected = event.sequence + 1;
                events.push(event);
            }
            if reached == last && expected <= last {
                events.push(gap(last + 1 - expected));
            }
            let items = join_gaps(hub.filter_events(&filter, events))
                .into_iter()
                .map(Ok::<_, Status>);
            let items: Vec<Result<v1::Event, Status>> = items.collect();
            Ok::<_, Status>(Some((futures_util::stream::iter(items), reached)))
        }
    });
    chunks.try_flatten()
}

/// Makes one of gaps with nothing between them: what is kept of traffic has many holes.
fn join_gaps(events: Vec<v1::Event>) -> Vec<v1::Event> {
    let mut joined: Vec<v1::Event> = Vec::with_capacity(events.len());
    for event in events {
        match joined.last_mut() {
            Some(last) if last.missed > 0 && event.missed > 0 => *last = gap(last.missed + event.missed),
            _ => joined.push(event),
        }
    }
    joined
}

fn gap(missed: u64) -> v1::Event {
    v1::Event {
        kind: v1::EventKind::Gap.into(),
        missed,
        text: format!("{missed} events are missing here"),
        ..Default::default()
    }
}

fn kinds(kinds: Vec<i32>) -> Result<Vec<i32>, Refusal> {
    for kind in &kinds {
        if !matches!(v1::EventKind::try_from(*kind), Ok(known) if known != v1::EventKind::Unspecified) {
            return Err(Refusal::field("kinds", format!("{kind} is not a kind of event")));
        }
    }
    Ok(kinds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_with_nothing_between_them_are_one() {
        let event = |sequence| v1::Event {
            sequence,
            ..Default::default()
        };
        let joined = join_gaps(vec![gap(2), gap(3), event(6), gap(1), event(8), gap(4)]);
        let read: Vec<(u64, u64)> = joined.iter().map(|e| (e.sequence, e.missed)).collect();
        assert_eq!(read, [(0, 5), (6, 0), (0, 1), (8, 0), (0, 4)]);
        assert!(joined[0].text.starts_with("5 events"));
    }
}

//! What is printed: tables for people, the contract's proto3 JSON (or the same as YAML) for programs.
//!
//! Data goes to stdout, words to stderr. JSON is the canonical proto3 JSON of the messages in
//! `vnet.v1`, so the documented contract documents it too; a list is an array of them, a watch
//! prints one object a line.

mod closed;
mod json;
mod table;
pub mod text;
pub mod words;

use std::fmt::Display;
use std::io::{self, Write};
use std::time::SystemTime;

use prost_reflect::DynamicMessage;

pub(crate) use self::closed::stdout_is_closed;
pub use self::table::Table;

use crate::failure::Failure;

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// Aligned columns for people.
    #[default]
    Table,
    /// The contract's proto3 JSON.
    Json,
    /// The same as YAML.
    Yaml,
}

/// Where a command's data goes, and in which form.
pub struct Output {
    format: Format,
    now: SystemTime,
    sink: Box<dyn Write + Send>,
}

/// A message of the contract, with how people see it.
pub trait Row: prost::Message {
    /// Its full name in the contract.
    const NAME: &'static str;
    /// The table's columns.
    const COLUMNS: &'static [&'static str];

    /// Its cells, one for each column.
    fn cells(&self, now: SystemTime) -> Vec<String>;
}

impl Output {
    /// Prints to stdout.
    pub fn stdout(format: Format) -> Self {
        let sink: Box<dyn Write + Send> = if stdout_is_closed() {
            Box::new(Closed)
        } else {
            Box::new(io::stdout())
        };
        Self::to(format, SystemTime::now(), sink)
    }

    /// Prints to `sink`, with ages as seen from `now`.
    pub fn to(format: Format, now: SystemTime, sink: Box<dyn Write + Send>) -> Self {
        Self { format, now, sink }
    }

    /// The form chosen.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The time that ages are told from.
    pub fn now(&self) -> SystemTime {
        self.now
    }

    /// Prints a list: a table with its header, or an array.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn list<M: Row>(&mut self, messages: &[M]) -> Result<(), Failure> {
        match self.format {
            Format::Table => {
                let mut table = Table::new(M::COLUMNS);
                for message in messages {
                    table.row(message.cells(self.now));
                }
                self.write(&table.to_string())
            }
            Format::Json | Format::Yaml => {
                let dynamic: Vec<DynamicMessage> = messages
                    .iter()
                    .map(|m| json::dynamic(M::NAME, m))
                    .collect::<Result<_, _>>()?;
                let text = json::render(self.format, &dynamic)?;
                self.write(&text)
            }
        }
    }

    /// Prints one message: `FIELD  VALUE` lines as `lines` gives them, or an object.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn one<M: prost::Message>(
        &mut self,
        name: &'static str,
        message: &M,
        lines: impl FnOnce() -> Vec<(&'static str, String)>,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table => {
                let text = table::fields(&lines());
                self.write(&text)
            }
            Format::Json | Format::Yaml => {
                let text = json::render(self.format, &json::dynamic(name, message)?)?;
                self.write(&text)
            }
        }
    }

    /// Prints the answer to a change: one sentence for people, the message for programs.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn done<M: prost::Message>(
        &mut self,
        name: &'static str,
        message: &M,
        sentence: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table => {
                let text = format!("{}\n", text::safe(&sentence()));
                self.write(&text)
            }
            Format::Json | Format::Yaml => {
                let text = json::render(self.format, &json::dynamic(name, message)?)?;
                self.write(&text)
            }
        }
    }

    /// Says what several answers came to: for people after those, for programs beside them, on stderr.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn sum_up(&mut self, sentence: &str) -> Result<(), Failure> {
        let sentence = text::safe(sentence);
        match self.format {
            Format::Table => self.write(&format!("{sentence}\n")),
            Format::Json | Format::Yaml => {
                say(sentence);
                Ok(())
            }
        }
    }

    /// Prints the header of a watch.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn stream_header(&mut self, columns: &[(&'static str, usize)]) -> Result<(), Failure> {
        if self.format == Format::Table {
            let cells = columns
                .iter()
                .map(|(title, _)| (*title).to_owned())
                .collect::<Vec<_>>();
            let text = table::stream_line(columns, &cells);
            self.write(&text)?;
        }
        Ok(())
    }

    /// Prints one message of a watch on one line: cells under the header's columns, or an object.
    /// YAML becomes one document a message.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn stream<M: prost::Message>(
        &mut self,
        name: &'static str,
        message: &M,
        columns: &[(&'static str, usize)],
        cells: impl FnOnce(SystemTime) -> Vec<String>,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table => {
                let text = table::stream_line(columns, &cells(SystemTime::now()));
                self.write(&text)
            }
            Format::Json => {
                let text = json::line(&json::dynamic(name, message)?)?;
                self.write(&text)
            }
            Format::Yaml => {
                let text = json::render(Format::Yaml, &json::dynamic(name, message)?)?;
                self.write(&format!("---\n{text}"))
            }
        }
    }

    /// Prints text as it is: a document that the user wrote, a completion script.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn write(&mut self, text: &str) -> Result<(), Failure> {
        self.sink.write_all(text.as_bytes())?;
        self.sink.flush()?;
        Ok(())
    }
}

/// What is behind a standard output that was closed from the start. It takes nothing, as a closed descriptor would.
struct Closed;

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(nix::errno::Errno::EBADF.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Prints what the command line's parser has to say: help to stdout, what is wrong to stderr.
///
/// # Errors
/// If it is help, and the output cannot be written.
pub(crate) fn print_parsed(said: &clap::Error) -> Result<(), Failure> {
    if said.use_stderr() {
        // Words that nobody can read change no exit code.
        let _ = said.print();
        return Ok(());
    }
    if stdout_is_closed() {
        Closed.write_all(b"help")?;
    }
    said.print()?;
    Ok(io::stdout().flush()?)
}

/// A line of words to stderr. One that cannot be written is lost: there is nobody left to tell. (`eprintln!`
/// would panic, and end what the words were only beside.)
pub fn say(line: impl Display) {
    // One write, so that lines of several processes do not mix.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

#[cfg(test)]
pub(crate) mod testing {
    //! An output that a test can read back.

    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, SystemTime};

    use super::{Format, Output};

    /// What was printed so far.
    #[derive(Clone, Default)]
    pub(crate) struct Printed(Arc<Mutex<Vec<u8>>>);

    impl Printed {
        pub(crate) fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Printed {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(buf)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The time that every test tells ages from: 2026-01-02T03:04:05Z.
    pub(crate) fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(NOW_SECONDS as u64)
    }

    /// `seconds` before [`now`].
    pub(crate) fn ago(seconds: i64) -> Option<prost_types::Timestamp> {
        Some(prost_types::Timestamp {
            seconds: NOW_SECONDS - seconds,
            nanos: 0,
        })
    }

    pub(crate) fn output(format: Format) -> (Output, Printed) {
        let printed = Printed::default();
        (Output::to(format, now(), Box::new(printed.clone())), printed)
    }

    const NOW_SECONDS: i64 = 1_767_323_045;
}

// Three examples that the embedded model can answer. In each, most of the prompt was computed before, but it does not stand
// at the prompt's beginning, where a prefix cache would find it.

import { withDocuments } from "./documents.js";
import { state } from "./keep.js";

// Documents -------------------------------------------------------------------------------------------------------------

const DOCUMENTS = [
  { name: "Observatory", text: "Observatory of Kestrel Hill. The dome opens on clear nights, and schools may visit on Fridays. The great telescope has a brass tube and a walnut stand. The astronomer is Lucia Marenko. The access code of the dome is 3615. Nobody may touch the lens, and lamps must be red after sunset. A wooden stair leads up to the gallery, where the old star charts hang in frames. The clockwork is wound every evening at nine, and the keeper writes the weather into a grey ledger. Visitors get hot tea in the porch while they wait for the clouds to pass." },
  { name: "Harbour", text: "Harbour office of Velmora. The harbour opens at dawn and closes when the bells ring. Boats longer than ten metres need a pilot. The harbour master is Jonas Pell. The access code of the lighthouse is 4173. Fuel is sold at the north pier, and fresh water is free for everyone who pays the mooring fee. Nets are dried on the long racks behind the fish hall, never on the quay. In autumn the ferry comes twice a day, and in winter only when the captain has finished his repairs. Lost ropes and lanterns are kept in the blue shed for a year." },
  { name: "Library", text: "Library of Brenholt. Books may be kept for three weeks, maps for one day only. The reading room is heated in winter and has forty seats. The librarian is Adela Finch. The access code of the map room is 9268. Visitors leave their bags at the door and speak softly. On Thursdays somebody reads aloud to children in the round room under the skylight. The oldest book is a herbal with painted leaves, shown once a year on the first day of May. Whoever loses a book brings another one that is about as thick." },
  { name: "Bakery", text: "Bakery of Tarnow. The ovens are lit at two in the morning and the first bread is sold at six. On feast days there is plum cake with caraway. The baker is Paul Okoro. The access code of the flour store is 7540. Apprentices sweep the yard, feed the cat and carry the loaves to the market square. Rye comes from the mill below the bridge, and the miller is paid in rolls. The first loaf is for the night watchman, who has had it every morning since the flood. Crumbs are kept for the ducks of the town pond." },
  { name: "Garden", text: "Botanical garden of Dolm. The glass house is warm all year and keeps orchids, ferns and one old lemon tree. Dogs wait outside. The gardener is Hana Weiss. The access code of the seed vault is 8092. Seeds are swapped on the first Sunday of the month. The lily pond is skimmed at noon, and its frogs are counted every spring by the school. Labels are written in pencil, since ink fades behind the glass. Cuttings are given away in October, wrapped in wet newspaper, as long as there are any." },
];
const ASKED = "Answer in one short sentence from the documents. What is the access code of the dome?";

// Stores five texts one by one, and asks about them in another order.
export async function askDocuments({ documents, ask, sides }, signal) {
  for (const { name, text } of DOCUMENTS) {
    if (!documents.all().some((note) => note.text === text)) await documents.remember(text, name, signal);
  }
  const notes = DOCUMENTS.map(({ text }) => documents.all().find((note) => note.text === text)).filter(Boolean);
  notes.sort((a, b) => a.text.length - b.text.length);
  const chips = notes.map(({ name, num_tokens, handle }) => ({ name, tokens: num_tokens, handle }));
  await ask({ question: ASKED, content: withDocuments(notes.map((note) => note.text), ASKED), documents: chips, sides }, signal);
}

// A chat ----------------------------------------------------------------------------------------------------------------

const CLOCK = (time) => `It is ${time} on Tuesday. You plan a journey with the user. Answer in one short sentence.`;
const CHAT = [
  ["user", "I have six days in May and want to see the coast of Velmora by train. I like old towns, small museums and long walks, and I do not want to change hotels every night. Where should I begin?"],
  ["assistant", "Begin in Brenholt, which has a direct night train and a walled old town. Stay three nights at the Blue Lantern, a small hotel beside the cathedral, and take day trips from there. The map museum is open every day but Monday, and the walk along the city wall takes two hours. On the second day you can ride the narrow railway to the salt marshes and be back for dinner."],
  ["user", "That sounds good. And the other three days? I would like to be by the sea then, and to take a boat once."],
  ["assistant", "Take the coast train to Tarnow, a fishing town with a long beach. Room 27 of the Heron Inn looks over the harbour, and I suggest that you book it for three nights. The boat to the lighthouse leaves at a quarter past nine, costs 14 crowns and comes back in the afternoon. On the last morning there is a market on the quay, where they sell smoked fish and honey cake for the journey home."],
];
const NEXT = "Which hotel is beside the cathedral?";

// The system message tells the time, so each turn of the chat begins with another text.
export async function askChat({ api, ask, sides }, signal) {
  const turns = CHAT.map(([role, content]) => ({ role, content }));
  await api.prefill([{ role: "system", content: CLOCK("10:42") }, ...turns], signal);
  state.system = CLOCK("10:47");
  state.turns = turns.map((turn) => ({ ...turn, question: turn.role === "user" ? turn.content : undefined }));
  await ask({ question: NEXT, content: NEXT, sides }, signal);
}

// Agents ----------------------------------------------------------------------------------------------------------------

const TASK = "The night job that sends invoices has stopped. Find out why.";
const AGENTS = [
  ["Log reader", "You read logs.", "I read the logs of the night from Monday to Tuesday. The job began at one o'clock as usual and wrote 212 invoices. At 01:17 it lost its connection to the mail server and tried again five times, with a pause of a minute each. Then it ended with exit code 75. The mail server itself reports no failure, and its own log shows other mail from the same hour. The connection was refused because the certificate was not accepted."],
  ["Historian", "You read the history of changes.", "I read the changes of the last seven days. There were nine, and eight of them touch only the web pages. The other one was made on Monday afternoon by the team for security: it replaced the certificate of the mail server, and the new one is signed by another authority. The note on it says that all clients take the list of authorities from the system. No change touched the invoices' job or its settings."],
  ["Tester", "You run tests.", "I ran the invoices' job by hand on the test machine, and it failed in the same way. Then I let it use the system's list of authorities in place of its own file, and it sent all of the 480 invoices in four minutes. With the old file it failed again. The job's own file is named partners.pem and is from three years ago. All other tests passed, those for the layout and the sums included."],
];
const DECIDE = "Answer in one short sentence. What was the exit code of the job?";

// Three agents have worked, each in a prompt of its own. A fourth gets their reports, behind another beginning.
export async function askAgents({ api, ask, sides }, signal) {
  for (const [, role, report] of AGENTS) {
    signal.throwIfAborted();
    const turns = [["system", role], ["user", TASK], ["assistant", report]];
    await api.prefill(turns.map(([role, content]) => ({ role, content })), signal);
  }
  state.system = "You lead a team of agents. You get their reports, and decide.";
  const reports = [...AGENTS].reverse();
  const content = [TASK, ...reports.map(([name, , report]) => `Report of the agent ${name}:\n${report}`), DECIDE].join("\n\n");
  await ask({ question: DECIDE, content, documents: reports.map(([name]) => ({ name: `Report: ${name}` })), sides }, signal);
}

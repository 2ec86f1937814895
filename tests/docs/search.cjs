// The search of the built site, as the browser runs it: its worker, on its index. Prints a list of pages per question.
// node search.cjs WORKER INDEX, with the questions as JSON on standard input.
const fs = require("fs");
const vm = require("vm");

const [worker, index] = process.argv.slice(2).map((file) => fs.readFileSync(file, "utf8"));
let listener;
const sandbox = { console, addEventListener: (_, called) => (listener = called) };
sandbox.self = vm.createContext(sandbox);
let answered;
sandbox.postMessage = (data) => answered(data);
vm.runInContext(worker, sandbox);

function ask(message) {
  return new Promise((resolve, reject) => {
    answered = resolve;
    Promise.resolve(listener({ data: message })).catch(reject);
  });
}

(async () => {
  await ask({ type: 0, data: { ...JSON.parse(index), options: {} } });
  const pages = [];
  for (const question of JSON.parse(fs.readFileSync(0, "utf8"))) {
    const answer = await ask({ type: 2, data: question });
    pages.push(answer.data.items.map(([first]) => first.location.split("#")[0]));
  }
  process.stdout.write(JSON.stringify(pages));
})();
